"""What reading one source counts besides its documents."""

from dataclasses import dataclass, field

from data_pipeline.config import SourceConfig
from data_pipeline.report import Tally


@dataclass(slots=True)
class Reading:
    """What reading one source counts besides documents."""

    config: SourceConfig
    tally: Tally
    replaced_documents: int = 0
    """Documents in which undecodable bytes were replaced."""
    replaced_characters: int = 0
    """U+FFFD that were put in."""
    fields_seen: set[str] = field(default_factory=set)
    """Fields of the records that had no text."""
    left_out_files: int = 0
    """Files that were not opened because of `limit_bytes`."""

    def drop(self, reason: str, identifier: str, text: str | bytes = "") -> None:
        """Tells the tally about a document that is not read on."""
        shown = text.decode(errors="replace") if isinstance(text, bytes) else text
        self.tally.drop(self.config.name, reason, identifier, len(text), shown)

    def decode(self, raw: bytes) -> str:
        """UTF-8 to text; what is none is replaced and counted."""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="replace")
            self.replaced_documents += 1
            self.replaced_characters += text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
            return text

    def without_surrogates(self, text: str) -> str:
        """JSON can spell half a character (`\\ud800`), UTF-8 cannot: it is replaced and counted."""
        if text.isascii():
            return text
        try:
            text.encode()
        except UnicodeEncodeError:
            return self.decode(text.encode(errors="surrogatepass"))
        return text
