"""What is refused before training reads anything."""

from data_pipeline.config import DataConfig, FillInTheMiddleConfig, Packing, PhaseConfig, training_problems


def test_senseless_schedules_are_refused_all_at_once() -> None:
    config = DataConfig(
        schedule=[
            PhaseConfig(from_step=3, sequence_length=48),
            PhaseConfig(from_step=3, mixture={"web": -1.0}),
            PhaseConfig(from_step=9, sequence_length=32),
        ],
        mask_documents=False,
        max_documents_per_sequence=4,
        fill_in_the_middle=FillInTheMiddleConfig(rate=1.5),
        follow_seconds=0,
    )
    assert [problem.key for problem in training_problems(config, 128)] == [
        "data.schedule.0.sequence_length",
        "data.schedule.1.from_step",
        "data.schedule.1.mixture.web",
        "data.schedule.2.sequence_length",
        "data.fill_in_the_middle.rate",
        "data.max_documents_per_sequence",
        "data.follow_seconds",
    ]
    good = DataConfig(packing=Packing.best_fit, max_documents_per_sequence=4, schedule=[PhaseConfig(from_step=0)])
    assert not list(training_problems(good, 128))
