"""Files, errors, locks, progress and bounds: what every other room stands on."""
