"""The fields that streams add to a model's configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class StreamFields:
    """The same fields on a model's configuration, where `config.json` keeps them; :class:`StreamConfig` explains and checks."""

    streams: int = 4
    stream_layers: int = 4
    lora_rank: int = 0
    transition_rank: int = 64
    pruning_rank: int = 0
    base_model_name_or_path: str | None = None


@dataclass(frozen=True)
class StreamConfig:
    """Shape of the streams of one model ("Speculative Streaming", arXiv 2402.11131).

    Attributes:
        streams: number of streams, gamma; stream j guesses the token j places after the next one. 0: a plain decoder.
        stream_layers: number of top layers that carry stream rows, N_s.
        lora_rank: rank of the low-rank updates that act on stream rows alone; 0 for none.
        transition_rank: rank of the bias from the token before the guessed one; 0 for none.
        pruning_rank: rank of the head that scores draft nodes before streams are added; 0 for none.
        base_model_name_or_path: where the main weights are when the checkpoint holds the streams alone.
    """

    streams: int = 4
    stream_layers: int = 4
    lora_rank: int = 0
    transition_rank: int = 64
    pruning_rank: int = 0
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "base_model_name_or_path" and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{field.name} must be an integer of 0 or more, got {value!r}.")
        if self.streams and not self.stream_layers:
            raise ValueError("streams need stream_layers of at least 1, got 0.")

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError if the decoder has fewer layers than the streams ask for."""
        if self.streams and self.stream_layers > num_layers:
            raise ValueError(
                f"stream_layers {self.stream_layers} exceeds the model's {num_layers} layers; "
                f"choose at most {num_layers}."
            )

    @classmethod
    def of(cls, config: object) -> StreamConfig:
        """Returns the stream fields that a model configuration carries."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def as_dict(self) -> dict[str, int | str | None]:
        """Returns the fields by name, as they stand in `config.json`."""
        return asdict(self)
