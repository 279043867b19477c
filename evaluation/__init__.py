"""How near a set of images is to another, and how likely images are to a flow."""

from runtime.handing_on import handed_on

# Names that other projects import from here, by the room that has them.
__getattr__ = handed_on(
    __name__,
    {
        "evaluation.features": "Extractor Rows load_extractor",
        "evaluation.likelihood": "LikelihoodOptions load_measured",
        "evaluation.metrics": "Moments Statistics Summary frechet_distance inception_score "
        "precision_and_recall score",
        "evaluation.options": "EvaluationOptions",
        "evaluation.report": "evaluate make_reference write_report",
        "evaluation.summaries": "deal summarize",
    },
)
