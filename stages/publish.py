"""Write a run's model card, and with --repo send the model to the Hub.

    diffclip publish runs/instruct --evaluate runs/evaluate                    # writes runs/instruct/README.md
    diffclip publish runs/instruct --evaluate runs/evaluate --repo me/diffclip-llava

The card is made of what the run directories say: data with digests, recipe, what learnt, versions, scores. Resume
checkpoints and logs are not sent.
"""

from pathlib import Path

from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from diffclip.base.files import write_whole
from diffclip.base.schema import MODEL_CARD


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip publish", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of pretrain, language, align or instruct")
    parser.add_argument("--evaluate", type=Path, nargs="*", default=[], help="runs of evaluate whose scores to state")
    parser.add_argument("--repo", default="", help="owner/name on the Hub; without it only the card is written")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    options = parser.parse_args(argv)
    from stages.model_card import model_card, upload

    write_whole(options.run / MODEL_CARD, model_card(options.run, options.evaluate, options.repo))
    print(f"wrote {options.run / MODEL_CARD}")
    if options.repo:
        print(f"sent to {upload(options.run, options.repo, options.private)}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
