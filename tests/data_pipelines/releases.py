"""Mini releases of every dataset in their original layouts, cut from a few generated scenes.

`write(root, work)` makes a raw root with one folder per release: the annotation files with the exact headers,
separators, line ends and known oddities of the originals (docs/datasets.md), and real media behind every row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from crab_jax.tasks.avs_classes import CLASSES
from crab_jax.tasks.placeholders import AUDIO, VIDEO
from data_pipelines.sources.scene_graph import CLASS_IDS, SECONDS, Scene, sample
from data_pipelines.sources.scene_media import PALETTE, SAMPLE_RATE, write_scene

COUNT = 3  # scenes behind all releases
FRAME = 224  # side of the pictures of AVSBench's object release


class Scenes:
    """The scenes behind the releases; `take` hands them out in turn."""

    def __init__(self, folder: Path):
        self.folder, self.scenes, self.taken = folder, [], 0
        index = 0
        while len(self.scenes) < COUNT:
            scene = sample(11, "train", index)
            index += 1
            if all(scene.sources(second) for second in range(SECONDS)):  # something sounds in every picture
                kinds = [(thing.kind, second) for second in range(SECONDS) for thing in scene.sources(second)]
                self.scenes.append(write_scene(folder / str(index), scene, kinds))

    def take(self) -> tuple[Scene, Path]:
        """The next scene and its folder."""
        scene = self.scenes[self.taken % COUNT]
        self.taken += 1
        return scene, self.folder / str(scene.index + 1)


def objects(scene: Scene, seconds: int) -> list[str]:
    """What is seen and heard in the first seconds of a scene."""
    return list(dict.fromkeys(thing.kind for k in range(seconds) for thing in scene.sources(k)))


def text(path: Path, content: str, newline: str = "\n", bom: bool = False) -> None:
    """Write an annotation file with the given line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it may be a hard link to the file of another test
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + content.replace("\n", newline).encode())


def table(path: Path, rows: Sequence[Sequence[object]], separator: str, **style) -> None:
    text(path, "".join(separator.join(map(str, row)) + "\n" for row in rows), **style)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def sound(source: Path, target: Path, seconds: float, rate: int = SAMPLE_RATE, channels: int = 1) -> None:
    """The first seconds of a scene's sound; a higher rate repeats samples."""
    target.parent.mkdir(parents=True, exist_ok=True)
    samples = soundfile.read(source, dtype="int16")[0][: int(seconds * SAMPLE_RATE)].repeat(rate // SAMPLE_RATE)
    soundfile.write(target, np.stack([samples] * channels, 1), rate, subtype="PCM_16")


# One function per release.

AVE_ROWS = {
    "train": [
        "Church bell&RUhOCu3LNXM&good&0&10",
        "Church bell&VWi2ENBuTbw&good&0&0",
        "Violin, fiddle&-67UNKFmRLk&good&7&10",
        "Mandolin&0f_iTO5t3hU&good&0&10",
        "Banjo&0f_iTO5t3hU&good&0&10",
    ],
    "val": ["Frying (food)&MH3m4AwEcRY&good&6&8"],
    "test": ["Ukulele&0f_iTO5t3hU&good&2&4", "Accordion&_-PljzzluWN&good&0&10"],
}
AVE_HEADER = "Category&VideoID&Quality&StartTime&EndTime"


def ave(root: Path, scenes: Scenes) -> None:
    """Split files without a header but for val's; Annotations.txt with one; two events of one video, in two splits."""
    rows = [row for part in AVE_ROWS.values() for row in part]
    text(root / "Annotations.txt", "\n".join([AVE_HEADER, *rows]) + "\n")
    for split, part in AVE_ROWS.items():
        header = [AVE_HEADER] if split == "val" else []
        text(root / f"{split}Set.txt", "\n".join([*header, *part]) + ("\n" if split != "test" else ""))
    for video in sorted({row.split("&")[1] for row in rows}):
        copy(scenes.take()[1] / "clip.mp4", root / "AVE" / f"{video}.mp4")


LLP_WEAK = {
    "train": [
        ("BjCEufrlXm4_20_30", "Speech,Dog"),
        ("KWdhwfzfppg_260_270", "Cello,Violin_fiddle,Accordion"),
        ("AP0061o0Nvk_101.8_111.8", "Car"),
    ],
    "val": [("6aV6c8mY0lg_30_40", "Chainsaw")],
    "test": [
        ("KSRjje7GH44_60_70", "Blender,Speech"),
        ("1-VMTJRpjbE_150_160", "Clapping,Clapping"),
        ("8DF2PxdT5tE_390_400", "Cheering,Frying_(food)"),
        ("_a-b_c-d_e-_0_10", "Dog"),
    ],
}
LLP_DENSE = {  # with a clip of no split, damaged ids, an inverted span, touching and doubled spans
    "audio": [
        ("KSRjje7GH44_60_70", 8, 10, "Blender"),
        ("KSRjje7GH44_60_70", 0, 3, "Speech"),
        ("KSRjje7GH44_60_70", 3, 5, "Speech"),
        ("KSRjje7GH44_60_70", 3, 5, "Speech"),
        ("6aV6c8mY0lg_30_40", 0, 10, "Chainsaw"),
        ("VMTJRpjbE_150_160", 2, 4, "Clapping"),
        ("19jWnmYnlD8_30_400", 0, 10, "Clapping"),
        ("8DF2PxdT5tE_390_400", 9, 0, "Cheering"),
        ("8DF2PxdT5tE_390_400", 0, 7, "Frying_(food)"),
    ],
    "visual": [
        ("6aV6c8mY0lg_30_40", 0, 1, "Chainsaw"),
        ("6aV6c8mY0lg_30_40", 3, 6, "Chainsaw"),
        ("6aV6c8mY0lg_30_40", 9, 10, "Chainsaw"),
        ("8DF2PxdT5tE_390_400", 5, 5, "Cheering"),
        ("_a-b_c-d_e-_0_10", 1, 9, "Dog"),
    ],
}


def llp(root: Path, scenes: Scenes) -> None:
    """Weak labels per split, dense ones of val and test together."""
    for split, name in (("train", "train"), ("val", "val_pd"), ("test", "test_pd")):
        table(root / f"data/AVVP_{name}.csv", [("filename", "event_labels"), *LLP_WEAK[split]], "\t")
        for filename, _ in LLP_WEAK[split]:
            copy(scenes.take()[1] / "clip.mp4", root / f"data/LLP_dataset/video/{filename[:11]}.mp4")
    weak = [row for rows in LLP_WEAK.values() for row in rows]
    table(root / "data/AVVP_dataset_full.csv", [("filename", "event_labels"), *weak], "\t")
    for kind, rows in LLP_DENSE.items():
        table(root / f"data/AVVP_eval_{kind}.csv", [("filename", "onset", "offset", "event_labels"), *rows], "\t")


def question(video: str, number: int, kind: str, content: str, values: Sequence[str], answer: str) -> dict:
    """One record of MUSIC-AVQA: seven fields in the released order, two of them JSON inside of text."""
    return {
        "video_id": video,
        "question_id": number,
        "type": json.dumps(kind.split("/")),
        "question_content": content,
        "templ_values": json.dumps(list(values)),
        "question_deleted": 0,
        "anser": answer,
    }


AVQA_ROWS = {
    "train": [
        question(
            "00000093", 12, "Audio/Counting", "How many musical instruments were heard throughout the video?", [], "one"
        ),
        question(
            "00000100",
            35,
            "Audio-Visual/Counting",
            "How many sounding <Object> in the video\uff1f",
            ["violin"],
            "three",
        ),
        question(
            "va00000093", 36, "Audio/Counting", "Are there <Object> and <Object> sound? ", ["cello", "congas"], "no"
        ),
        question(
            "00000100",
            37,
            "Audio/Counting",
            "How many musical instruments were heard throughout the video?",
            [],
            "more than ten",
        ),
    ],
    "val": [question("00006835", 40, "Visual/Location", "Where is the performance?", [], "indoor")],
    "test": [
        question(
            "00006835",
            4639,
            "Audio-Visual/Location",
            "What is the <LR> instrument of the <FL> sounding instrument?",
            ["left", "first"],
            "saxophone",
        ),
        question(
            "esa00000500",
            43702,
            "Audio/Comparative",
            "Is the <Object> more rhythmic than the <Object>?",
            ["erhu", "electric_bass"],
            "yes",
        ),
        question(
            "00000093", 47300, "Audio-Visual/Temporal", "Where is the <FL> sounding instrument?", ["last"], "left"
        ),
    ],
}


def music_avqa(root: Path, scenes: Scenes) -> None:
    """Both sets of annotations; in `json` one question of test comes twice, with two answers."""
    for split, rows in AVQA_ROWS.items():
        text(root / f"data/json_update/avqa-{split}.json", json.dumps(rows, indent=2))
        twice = [{**rows[-1], "anser": "right"}] if split == "test" else []
        text(root / f"data/json/avqa-{split}.json", json.dumps(rows + twice, indent=2))
    for video in sorted({row["video_id"] for rows in AVQA_ROWS.values() for row in rows}):
        copy(scenes.take()[1] / "clip.mp4", root / f"videos/{video}.mp4")


SEMANTIC_ROWS = {  # part -> split -> uid
    "v1s": {"train": "_4R3qHn1n50_0_5000", "val": "-_wznbUu3DY_0_5000", "test": "HxMoMMrA6Eo_0_5000"},
    "v1m": {"train": "jlhuZfcw61w", "val": "xv7eM6-UmkY_36", "test": "3vheOi4y540_1"},
    "v2": {"train": "_aldtLqTVYI_1000_11000", "val": "bbbbbbbbbbb_0_10000", "test": "ccccccccccc_3000_13000"},
}


def avsbench_semantic(root: Path, scenes: Scenes) -> None:
    """v1s, v1m and v2 in one metadata.csv; L and RGB masks of the pictures' size, with a stray speck and colour."""
    rows: list[tuple] = [("vid", "uid", "s_min", "s_sec", "a_obj", "split", "label")]
    for part, splits in SEMANTIC_ROWS.items():
        seconds = 10 if part == "v2" else 5
        for split, uid in splits.items():
            scene, source = scenes.take()
            names = objects(scene, seconds)[: 1 if part == "v1s" else None]
            rows.append((uid[:11], uid, 0, 0, "_".join(names), split, part))
            at = root / part / uid
            rate, channels = (48000, 2) if part == "v2" else (16000, 2)
            sound(source / "audio.wav", at / "audio.wav", seconds + 0.02, rate, channels)
            for k in range(seconds):
                copy(source / f"frames/{k}.jpg", at / f"frames/{k}.jpg")
            for k in range(1 if part == "v1s" and split == "train" else seconds):
                ids = np.array(Image.open(source / f"labels_semantic/{k}.png"))
                if part == "v1s":
                    ids[ids != CLASS_IDS[names[0]]] = 0
                elif not k:
                    ids[:3, :5] = CLASSES.index("boy")  # a speck of 15 pixels
                mask(at / f"labels_semantic/{k}.png", ids)
                colours = np.array(PALETTE, np.uint8).reshape(-1, 3)[ids]
                if part == "v2":
                    colours[-2:, -2:] = (1, 2, 3)  # no colour of the palette
                mask(at / f"labels_rgb/{k}.png", colours)
    table(root / "metadata.csv", rows, ",")
    text(root / "label2idx.json", json.dumps({name: number for number, name in enumerate(CLASSES, 1)}))


def mask(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype(np.uint8))
    (image.convert(mode) if mode else image).save(path, compress_level=1)


S4_ROWS = [
    ("-_wznbUu3DY", 0, "helicopter", "train"),
    ("XVlnx4ofu2k", 6, "race_car", "val"),
    ("_4R3qHn1n50", 0, "lawn_mowing", "test"),
]
MS3_ROWS = [("jlhuZfcw61w", "train"), ("xv7eM6-UmkY_36", "val"), ("3vheOi4y540_1", "test")]


def avsbench_object(root: Path, scenes: Scenes) -> None:
    """S4 with one mask in train, a four-second clip (start 6) and an empty mask in test; MS3's names with `.mp4`."""
    table(root / "Single-source/s4_meta_data.csv", [("name", "start", "category", "split"), *S4_ROWS], ",")
    for name, start, category, split in S4_ROWS:
        scene, source = scenes.take()
        at, key = root / "Single-source/s4_data", f"{split}/{category}/{name}"
        copy(source / "clip.mp4", at / f"raw_videos/{key}.mp4")
        sound(source / "audio.wav", at / f"audio_wav/{key}.wav", 4 if start == 6 else 5)
        for k in range(5):
            picture(source, k, at / f"visual_frames/{key}/{name}_{k + 1}.png")
            if split != "train" or not k:
                empty = split == "test" and k == 2
                pixels = np.zeros((FRAME, FRAME)) if empty else foreground(source, k)
                mask(at / f"gt_masks/{key}/{name}_{k + 1}.png", pixels, "1")
    table(root / "Multi-sources/ms3_meta_data.csv", [("video_id", "split"), *MS3_ROWS], ",")
    for name, split in MS3_ROWS:
        scene, source = scenes.take()
        at = root / "Multi-sources/ms3_data"
        sound(source / "audio.wav", at / f"audio_wav/{split}/{name}.wav", 5)
        for k in range(5):
            picture(source, k, at / f"visual_frames/{name}/{name}.mp4_{k + 1}.png")
            mask(at / f"gt_masks/{split}/{name}/{name}_{k + 1}.png", foreground(source, k))


def picture(source: Path, second: int, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.open(source / f"frames/{second}.jpg").resize((FRAME, FRAME)).save(target, compress_level=1)


def foreground(source: Path, second: int) -> np.ndarray:
    """uint8[224,224]: 255 where something sounds."""
    ids = Image.open(source / f"labels_semantic/{second}.png").resize((FRAME, FRAME), Image.Resampling.NEAREST)
    return 255 * (np.array(ids) > 0)


REF_AVS_ROWS = [  # vid, uid, split, fid, exp
    (
        "-8mcyL3kWNQ_8000_18000",
        "-8mcyL3kWNQ_8000_18000_emergency-car_1",
        "train",
        11,
        "The object making the longest sound duration.",
    ),
    (
        "45AfEdAU050_99000_109000",
        "null_c-45AfEdAU050_99000_109000_null_1",
        "train",
        0,
        "The object making a continuous sound",
    ),
    ("G8YSz3L1R3M_75000_85000", "G8YSz3L1R3M_75000_85000_boy_1", "train", 0, "Error: request failed"),
    ("--KCIeTv6PM_14000_24000", "--KCIeTv6PM_14000_24000_cat_1", "val", 0, "The object having white and gray fur."),
    ("MDyjY3uiWp0_297000_307000", "MDyjY3uiWp0_297000_307000_saw_4", "test_s", 0, '"the saw, on the left "'),
    ("MDyjY3uiWp0_297000_307000", "MDyjY3uiWp0_297000_307000_saw_4", "test_s", 1, "The saw\u2019s owner."),
    ("bbbbbbbbbbb_0_10000", "bbbbbbbbbbb_0_10000_wolf_6", "test_u", 0, "The animal that howls."),
    (
        "-cLOg0sQ0Zo_420000_430000",
        "null_m--cLOg0sQ0Zo_420000_430000_null_1",
        "test_n",
        0,
        "The object making a sound with a faster rhythm",
    ),
    ("ddddddddddd_0_10000", "ddddddddddd_0_10000_man_1", "TODO", 0, "never shown"),
]


def ref_avs(root: Path, scenes: Scenes) -> None:
    """CRLF; folders by the uid's prefix; the null row of train has masks, that of test_n none."""
    table(root / "metadata.csv", [("vid", "uid", "split", "fid", "exp"), *REF_AVS_ROWS], ",", newline="\r\n")
    for _, uid, split, fid, _ in REF_AVS_ROWS:
        folder = uid.rsplit("_", 2)[0]
        if split == "TODO":
            continue
        if not (root / "media" / folder).exists():
            scene, source = scenes.take()
            sound(source / "audio.wav", root / f"media/{folder}/audio.wav", 10, 48000, 2)
            for k in range(10):
                copy(source / f"frames/{k}.jpg", root / f"media/{folder}/frames/{k}.jpg")
        for k in range(10) if split != "test_n" else ():
            ids = np.array(Image.open(source / f"labels_semantic/{k}.png"))
            pixels = 0 * ids if "null" in uid else 255 * (ids > 0)
            mask(root / f"gt_mask/{folder}/fid_{fid}/0000{k}.png", pixels)


VALOR_ROWS = {
    "train": [
        ("x-2Abohj8VY_30.000_40.000", "With the rumble, on a moving bus, a crowd spoke."),
        ("0_3-a_bcdef_0.000_7.000", "A short one"),
    ],
    "val": [("CEfOX4fYlsY_20.000_30.000", "In one room, a yellow bird leaped over the fence.")],
    "test": [("eeeeeeeeeee_0.000_10.000", "A piano plays.")],
}


def valor(root: Path, scenes: Scenes) -> None:
    """JSON of one line."""
    for split, rows in VALOR_ROWS.items():
        text(root / f"desc_{split}.json", json.dumps([{"video_id": video, "desc": desc} for video, desc in rows]))
        for video, _ in rows:
            copy(scenes.take()[1] / "clip.mp4", root / f"video_data/{video}.mp4")


def video_llava(root: Path, scenes: Scenes) -> None:
    """Placeholders first and last; an answer without a full stop; a video named without its ending, as Valley does."""

    def turns(asked: str, answered: str) -> list[dict]:
        return [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]

    images = [
        {
            "id": 0,
            "image": "llava_image/00453/004539375.jpg",
            "conversations": turns(
                "<image>\nRender a clear and concise summary of the photo.", "select luxury furniture"
            ),
        },
        {
            "id": "1",
            "image": "llava_image/00453/004539376.jpg",
            "conversations": turns(
                "Write a terse but informative summary of the picture.\n<image>", "a drum on a table ."
            ),
        },
    ]
    videos = [
        {
            "id": 0,
            "video": "valley/000001/7.mp4",
            "conversations": turns("<video>\nWhat are the main activities?", "Someone plays the piano!"),
        },
        {"id": 1, "video": "valley/000001/8", "conversations": turns("What happens?\n<video>", "Nothing")},
    ]
    text(root / "llava_image_.json", json.dumps(images))
    text(root / "valley_.json", json.dumps(videos))
    for record in images:
        copy(scenes.take()[1] / "frames/4.jpg", root / record["image"])
    for name in ("7", "8"):
        copy(scenes.take()[1] / "clip.mp4", root / f"valley/000001/{name}.mp4")


AUDIOCAPS_ROWS = {
    "train": [
        (91139, "r1nicOVtvkQ", 130, "A woman talks nearby as water pours"),
        (11542, "3eJ9RynJzP8", 80, '"The wind is blowing, insects are singing, and rustling occurs"'),
        (12347, "3zCI4li7fe0", 30, "Woman giving a spe\u00e9ch"),
    ],
    "val": [(97151 + i, "vfY_TJq7n_U", 130, f"Caption {i}") for i in range(5)],
    "test": [(103 + i, "-ab_cdefghi", 0, f"Words {i}") for i in range(5)],
}


def audiocaps(root: Path, scenes: Scenes) -> None:
    """CSV with CRLF; five captions of each val and test clip, whose sound lies under one of their ids."""
    for split, rows in AUDIOCAPS_ROWS.items():
        header = ("audiocap_id", "youtube_id", "start_time", "caption")
        table(root / f"dataset/{split}.csv", [header, *rows], ",", newline="\r\n")
        for number, *_ in rows if split == "train" else rows[3:4]:
            sound(scenes.take()[1] / "audio.wav", root / f"data/{number}.wav", 10)


def lvis(root: Path, scenes: Scenes) -> None:
    """A train image that lies in val2017; an object in two parts, and one below a thousand pixels."""
    for split, number in (("train", 155379), ("val", 397133)):
        name = f"val2017/{number:012d}.jpg"
        copy(scenes.take()[1] / "frames/4.jpg", root / name)
        square = [10.5, 10, 60, 10, 60, 60, 10.5, 60]
        text(
            root / f"lvis_v1_{split}.json",
            json.dumps(
                {
                    "info": {},
                    "licenses": [],
                    "images": [
                        {
                            "id": number,
                            "width": 128,
                            "height": 128,
                            "license": 1,
                            "neg_category_ids": [],
                            "coco_url": f"http://images.cocodataset.org/{name}",
                            "not_exhaustive_category_ids": [],
                        }
                    ],
                    "categories": [
                        {
                            "id": 36,
                            "name": "bat_(animal)",
                            "synset": "bat.n.01",
                            "synonyms": ["bat_(animal)"],
                            "def": "nocturnal mouselike mammal",
                            "frequency": "r",
                            "image_count": 1,
                            "instance_count": 2,
                        }
                    ],
                    "annotations": [
                        {
                            "id": 1,
                            "image_id": number,
                            "category_id": 36,
                            "area": 2900.5,
                            "bbox": [10.5, 10, 109.5, 110],
                            "segmentation": [square, [100, 100, 120, 100, 120, 120]],
                        },
                        {
                            "id": 2,
                            "image_id": number,
                            "category_id": 36,
                            "area": 12.0,
                            "bbox": [0, 0, 4, 3],
                            "segmentation": [[0, 0, 4, 0, 4, 3]],
                        },
                    ],
                }
            ),
        )


def own(root: Path, scenes: Scenes) -> None:
    """A video, a folder of frames with sound beside it, and ids in another script; a byte order mark and CRLF."""
    for split in ("train", "val", "test"):
        source = scenes.take()[1]
        copy(source / "clip.mp4", root / f"media/{split}.mp4")
        sound(source / "audio.wav", root / f"media/{split}.wav", 10)
        for k in range(10):  # frame10.jpg sorts before frame2.jpg as text
            copy(source / f"frames/{k}.jpg", root / f"media/{split}_frames/frame{k + 1}.jpg")
        prompt = f"{VIDEO}{AUDIO}What is it?"
        rows = [
            {
                "id": "\u526a\u8f91 1",
                "task": "avcap",
                "instruction": prompt,
                "target": "A piano.",
                "video": f"media/{split}.mp4",
                "meta": {"captions": ["A piano."]},
            },
            {
                "id": "two",
                "task": "avcap",
                "instruction": prompt,
                "target": "A drum.",
                "frames": f"media/{split}_frames",
                "audio": f"media/{split}.wav",
                "meta": {"captions": ["A drum."]},
            },
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        text(root / f"{split}.jsonl", lines + "\n\n", newline="\r\n", bom=True)


WRITERS = (ave, llp, music_avqa, avsbench_semantic, avsbench_object, ref_avs, valor, video_llava, audiocaps, lvis, own)


def write(root: Path, work: Path) -> None:
    """All mini releases, each in a folder of its name under `root`; `work` takes the scenes."""
    scenes = Scenes(work)
    for writer in WRITERS:
        writer(root / writer.__name__, scenes)
