const dark = window.matchMedia("(prefers-color-scheme: dark)");

function draw() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false };
  for (const chart of document.querySelectorAll(".chart")) {
    const figure = JSON.parse(chart.nextElementSibling.textContent);
    for (const trace of figure.data) {
      const series = colour("--series-" + (trace.meta.series % 8));
      trace.line = { ...trace.line, color: series, width: 2 };
      trace.marker = { ...trace.marker, color: series };
    }
    Object.assign(figure.layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: "system-ui, sans-serif" },
      showlegend: figure.data.length > 1,
      hoverlabel: { bgcolor: colour("--card"), font: { color: colour("--ink") } },
    });
    Object.assign(figure.layout.xaxis, axis);
    Object.assign(figure.layout.yaxis, axis);
    Plotly.react(chart, figure.data, figure.layout, { displayModeBar: false, responsive: true });
  }
}

dark.addEventListener("change", draw);
draw();
