"""`ecn-dist VERB ...`: the same mains as `python -m ecn_dist.VERB ...`."""

import importlib
import sys

VERBS = {
    "demo": "synthetic domains -> shards -> training -> table and pictures",
    "synthesize": "draw a synthetic domain as a Market-1501 style folder",
    "pack": "turn a folder of pictures into shards",
    "validate": "check a shard folder and print its summary",
    "train": "train on a labelled source and an unlabelled target (under torchrun for several ranks)",
    "evaluate": "CMC, mAP and mINP of a checkpoint on a shard folder",
    "label": "the clusters of a shard folder's pictures by a trained model",
    "stylize": "learn camera styles, and write shards with copies in them (under torchrun for several ranks)",
    "embed": "features of a folder of pictures, in a file that opens without this project",
    "search": "the pictures of such a file that are nearest to a query picture",
    "export": "a trained model as ONNX or PT2, checked, with its model card",
    "report": "one self-contained HTML file of a run: what was trained, how well it does, where it fails",
    "doctor": "is everything well where a run is to be started? (under torchrun also between the ranks)",
}


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(["usage: ecn-dist VERB [options]   (ecn-dist VERB --help for its options)", "", *lines])


def main(argv: list[str] | None = None) -> int:
    """Hand the rest of the command line to the verb's own main; return its exit status."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb not in VERBS:
        print(f"error: no such verb: {verb!r}\n{usage()}" if verb else usage(), file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"ecn_dist.{verb}")
    except KeyboardInterrupt:  # before the command itself minds it
        return 130
    return module.main(rest)


if __name__ == "__main__":
    raise SystemExit(main())
