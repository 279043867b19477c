"""What drawing a study is for each of them: its flags, and what ends it."""

from pathlib import Path

from records import read_study
from runtime.command_line import Parser, reason

ROOT = Path(__file__).resolve().parents[2]


def plot_parser(script, doc, study, results):
    """The parser of a script that draws the results of a study, the script of that name."""
    parser = Parser(script, description=doc)
    help_text = f"folder that {study}.py wrote (default: the committed one)"
    parser.add_argument("--results", type=Path, default=results, help=help_text)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs", help="folder for the figure (default: docs)"
    )
    return parser


def run_plot(parser, argv, point, draw_figure, tables, figure, what):
    """Draw the figure of that name and print the tables, both of (rows, study.json). `what` says
    what a folder without them does not hold.
    """
    args = parser.parse_args(argv)
    try:
        rows, about = read_study(args.results, point)
        args.output.mkdir(parents=True, exist_ok=True)
        draw_figure(rows, about, args.output / figure)
    except (ValueError, OSError) as error:
        parser.error(reason(error))
    except (KeyError, TypeError, IndexError) as error:
        parser.error(
            f"{args.results} holds no {what} ({error!r}); give a folder that its script wrote"
        )
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed; pip install .[track]")
    print("\n".join(tables(rows, about)))
