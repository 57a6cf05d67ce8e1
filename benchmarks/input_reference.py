"""The reference's way of loading a sample, for benchmarks/input.py: decord, librosa, torchaudio, CLIPImageProcessor.

Needs those four, and none of this project, so it runs in an environment of its own. Reads one JSON object a line from
standard input, a round: {"samples": [{"video" or "frames", "audio", "windows"}], "size": S, "frames": T}; answers with
the CPU seconds that one thread took for each round.
"""

from __future__ import annotations

import json
import sys
import time

import decord
import librosa
import numpy as np
import torch
import torchaudio.compliance.kaldi as kaldi
import transformers
from PIL import Image

try:  # the one of transformers 4, on NumPy and Pillow, under its name in transformers 5
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

PARTS = {"ten": 10, "five": 5}


def frames_of(sample: dict, processor: CLIPImageProcessor, size: int, count: int) -> torch.Tensor:
    """float32[n, 3, S, S], normalised."""
    if "video" in sample:
        video = decord.VideoReader(sample["video"], height=size, width=size, num_threads=1)
        taken = min(count, len(video))
        numbers = np.arange(0, len(video), len(video) / taken).astype(int)
        pictures = [Image.fromarray(frame) for frame in video.get_batch(numbers).asnumpy()]
    else:
        pictures = [Image.open(path).convert("RGB").resize((size, size)) for path in sample["frames"]]
    return processor.preprocess(pictures, return_tensors="pt")["pixel_values"]


def bands_of(sample: dict) -> torch.Tensor:
    """float32[windows, frames, 128], normalised."""
    wave, rate = librosa.load(sample["audio"], sr=16000, mono=True)
    parts = PARTS[sample["windows"]]
    unit = len(wave) // parts
    windows = [torch.from_numpy(wave[i * unit : (i + 1) * unit])[None] * 2**15 for i in range(parts)]
    bands = [kaldi.fbank(w, num_mel_bins=128, sample_frequency=rate, frame_length=25, frame_shift=10) for w in windows]
    return (torch.stack(bands) - 15.41663) / (2 * 6.55582)


def main() -> None:
    torch.set_num_threads(1)
    versions = {
        "decord": decord.__version__,
        "librosa": librosa.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        size = asked["size"]
        processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        began = time.process_time()
        for sample in asked["samples"]:
            frames_of(sample, processor, size, asked["frames"])
            bands_of(sample)
        print(json.dumps({"seconds": time.process_time() - began}), flush=True)


if __name__ == "__main__":
    main()
