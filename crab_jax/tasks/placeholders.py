"""The parts of prompts and targets that tasks share: one block per modality, and the run of mask tokens.

Source: dataset/unified_dataset.py. The words inside angle brackets are tokens of their own (data_pipelines/tokens.py);
`<video>`, `<audio>` and `<image>` are replaced by feature slots.
"""

VIDEO = "This is a video:\n<video_start><video><video_end>\n"
AUDIO = "This is an audio:\n<audio_start><audio><audio_end>\n"
IMAGE = "This is an image:\n<image_start><image><image_end>\n"
MASK = "<mask_start><mask_0><mask_1><mask_2><mask_3><mask_4><mask_5><mask_end>"
