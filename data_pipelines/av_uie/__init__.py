"""AV-UIE: explicit-reasoning targets, built from plain labels and checked against them (paper section 3).

    released.py   the five released `*_converted_label.zip` -> Examples
    templates.py  a deterministic writer whose sentences come from the label alone; questions.py: MUSIC-AVQA's questions
    prompts.py    the same facts as a request to an LLM      annotate.py   asking it: journal, pace, retries, cost
    verify.py     every target against its label             review.py     the page on which a person looks at them
    card.py       what a data set holds

labels.py says what a label means. Everything maps Example -> Example; `meta["reasoning"]` names who wrote the text:
`template`, `released` or `llm:<model>`. Commands: `python -m data_pipelines.av_uie --help`; guide: docs/av_uie.md.
"""
