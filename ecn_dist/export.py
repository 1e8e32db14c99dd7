"""`export`: a trained model as a file that other programs run, with its model card."""

from pathlib import Path
from typing import Annotated

from ecn_dist.command import Checkpoint, RunConfig, verb
from ecn_dist.config import flatten
from ecn_dist.errors import UserError
from ecn_dist.reporting import model_card
from ecn_dist.serving import exporting
from ecn_dist.serving.embedder import Embedder


@verb("export", "example: ecn-dist export --checkpoint runs/m2d --format onnx --output m2d.onnx")
def main(
    *,
    format: Annotated[str, tuple(exporting.FORMATS)],
    output: Path,
    checkpoint: Checkpoint,
    config: RunConfig | None = None,
) -> int:
    """Write a trained model as ONNX or PT2 (torch.export): pictures in, features of unit length out.

    The file takes normalised pictures (n, 3, H, W) float32, any n, and gives features (n, C) float32. It is loaded
    again and held against the model on random input before it gets its name. Input size, normalisation, feature length
    and the model's fingerprint stand in its metadata; what it was trained on, how well it does and what it is not for
    stand in MODEL_CARD.md beside it. A card of this model that is there already is kept as it is, as it may have been
    completed by hand; one of another model is an error.

    Args:
        format: onnx needs an extra: pip install 'ecn_dist[export]'
        output: the file to write, ending in .onnx or .pt2
    """
    exporting.check_export(format, output)
    embedder = Embedder.load(checkpoint, "cpu", config)
    card = output.absolute().parent / model_card.NAME
    if card.is_file() and embedder.fingerprint not in card.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{card} is the card of another model; export to a folder of its own, or remove that card")
    facts = None if card.is_file() else model_card.facts_of(checkpoint, config)
    metadata = exporting.describe(embedder.backbone, embedder.height, embedder.width, embedder.fingerprint)
    difference = exporting.export(embedder.backbone, format, output, metadata)
    print(f"wrote {output}: within {difference:.1e} of the model on random input")
    if facts is None:
        print(f"kept {card} as it is, as it is this model's; remove it to have it written anew")
    else:
        model_card.write_card(card, embedder.backbone, flatten(embedder.config), facts)
        print(f"wrote {card}: complete it before you pass the model on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
