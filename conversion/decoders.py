"""What left-to-right families have in common: how much of a text the DRT sees that takes their place."""


def retrieving(num_layers: int, reach: int | None, rolls: bool = False) -> dict:
    """Return the fields of a DRT that reads `reach` tokens by self-attention and chunks in its upper half.

    Without landmarks in the text (`landmark_source="mean"`) and with a silent cross-attention it is the same function
    as its source, on texts of any length that the window covers. Beyond it the first token stays visible, unless the
    source's own window `rolls`: without it a source that always saw it writes nonsense.
    """
    upper = num_layers - num_layers // 2
    return {
        "num_lower_layers": num_layers - upper,
        "retrieval_groups": [upper],
        "sliding_window": reach,
        "num_sink_tokens": int(reach is not None and not rolls),
        "landmark_source": "mean",
    }
