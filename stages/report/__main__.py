"""Stage 5: report. The paper's tables and figures, and what lies behind them, from any set of run directories.

Every directory with a run.json at or below the given paths is read and grouped by model and seed. Partial runs are
welcome: what is missing is shown as a dash with the reason. No model is run, so it takes seconds. Written are
index.html (one self-contained page), report.md, figures/ (SVG, PNG), tables/ (CSV, LaTeX) and table.csv.

    diffclip report runs/quickstart --output_dir report/
"""

from pathlib import Path

from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("--output_dir", type=Path, default=Path("report"), help="directory to write (report)")
    parser.also("--output_dir", "--out")
    arguments = parser.parse_args(argv)
    from stages.report.build import build_report

    build_report(arguments.runs, arguments.output_dir)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
