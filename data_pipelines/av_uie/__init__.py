"""AV-UIE: explicit-reasoning targets, written from plain labels and checked against them (paper section 3).

    released.py   the five released `*_converted_label.zip` -> Examples
    templates.py  a deterministic writer whose sentences come from the label alone; questions.py: MUSIC-AVQA's questions
    prompts.py    the same facts as a request to an LLM      annotate.py   the requests: journal, rate, retries, cost
    verify.py     comparison of every target with its label
    card.py       statistics of a dataset

labels.py interprets the labels. Everything maps Example -> Example; `meta["reasoning"]` names the writer of the text:
`template`, `released` or `llm:<model>`. crab_jax/reports/review_page.py writes the page for human review. Commands:
`python -m data_pipelines.av_uie --help`; guide: docs/av_uie.md.
"""
