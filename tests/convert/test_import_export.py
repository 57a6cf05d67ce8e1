"""Whole checkpoints: imported from the golden files, exported again, and refused when a file is not as it should be."""

import dataclasses
import json
import re
import shutil
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from crab_jax import evaluate, predict, train
from crab_jax.checkpoints import digests, models, stored
from crab_jax.convert import importing, torch_file, torch_writer
from crab_jax.convert.__main__ import main, parser
from crab_jax.convert.exporting import export
from crab_jax.convert.importing import REPORT, Files, import_weights
from crab_jax.convert.released import Choices
from crab_jax.convert.torch_writer import Tensor
from crab_jax.io import stored_tensors
from crab_jax.io.errors import InputError
from crab_jax.runs import run_params
from crab_jax.tasks import TASKS
from data_pipelines.examples import read_jsonl
from data_pipelines.tokens import Tokenizer

ROUTE = "base_model.model.model.layers.0.mlp.up_proj.lora_route.weight"


@pytest.fixture(scope="module")
def choices(golden) -> Choices:
    config = json.loads((golden / "manifest.json").read_text())["config"]
    return Choices(
        bert_heads=config["bert"]["num_attention_heads"],
        taps=tuple(config["select_layer_list"]),
        lora_alpha=config["lora"]["lora_alpha"],
        low_res=config["seg"]["low_res_mask_size"],
        dtype="float32",
    )


@pytest.fixture(scope="module")
def files(golden, tmp_path_factory) -> Files:
    weights, tokenizer = golden / "weights", tmp_path_factory.mktemp("tokenizer")
    Tokenizer.load(weights / "llama").save(tokenizer)  # faster to load than the sentencepiece model
    return Files(
        weights / "clip",
        weights / "llama",
        next((weights / "beats").glob("*.pt")),
        (weights / "crab/finetune_weights.bin", weights / "crab/avs_finetune_weights.bin"),
        tokenizer,
    )


@pytest.fixture(scope="module")
def imported(files, choices, tmp_path_factory):
    """(folder, report) of the whole model, position matrices drawn from seed 0."""
    out = tmp_path_factory.mktemp("imported")
    return out, import_weights(files, out, choices)


def rewrite(path, out, change):
    """A torch file with its dict of arrays changed."""
    arrays = dict(torch_file.read(path))
    change(arrays)
    torch_writer.save(out, {k: Tensor(v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()})
    return out


def with_heads(heads):
    def change(arrays):
        for key in [key for key in arrays if ".lora_B0." in key]:
            low = arrays[key]
            for head in range(8):
                arrays.pop(key.replace("lora_B0", f"lora_B{head}"), None)
            arrays |= {key.replace("lora_B0", f"lora_B{head}"): low + head for head in range(heads)}
            route = key.replace("lora_B0", "lora_route")
            arrays[route] = np.resize(arrays[route], (heads, arrays[route].shape[1]))

    return change


def test_the_report_accounts_for_every_key_and_parameter(files, imported, capsys):
    out, report = imported
    assert report == json.loads((out / REPORT).read_text())
    for where, source in report["sources"].items():
        assert source["used"] + sum(source["ignored"].values()) == source["keys"], where
    reasons = {why for source in report["sources"].values() for why in source["ignored"]}
    assert {"masked-language head of BERT", "dead word embeddings of BERT", "classifier of the audio events"} <= reasons
    model, params, config, _ = run_params.load_model(out)
    drawn = [path for path, origin in report["parameters"]["not_from_weight_files"].items() if "seed 0" in origin]
    assert len(drawn) == 2 and all("positional_encoding" in path for path in drawn)
    assert (report["lora_heads"], report["queries"]["visual"]) == (model.cfg.lora.heads, model.cfg.visual.queries)
    assert config.compat == report["compat"] == "released" and not model.cfg.seg.chain_queries
    config = dataclasses.replace(config, init_from=str(out))
    starting = run_params.initial_params(config, model)  # what train begins with
    assert not capsys.readouterr().err
    config = dataclasses.replace(config, compat="paper")
    run_params.initial_params(config, model)
    assert "was made with compat='released'" in capsys.readouterr().err
    np.testing.assert_array_equal(starting["al_projector"]["query_tokens"], params["al_projector"]["query_tokens"])
    router = torch_file.read(files.crab[0])[ROUTE]
    np.testing.assert_array_equal(params["llama"]["layers"]["mlp"]["up_proj"]["lora_route"][0], router.T)


def test_import_export_import_is_bit_exact(files, choices, imported, tmp_path):
    first, _ = imported
    written = export(first, "crab", tmp_path / "crab") + export(first, "hf", tmp_path / "hf")
    assert {path.name for path in written} >= {
        "finetune_weights.bin",
        "avs_finetune_weights.bin",
        "visual_pretrain.bin",
        "audio_pretrain.bin",
        "segmentation_pretrain.bin",
        "model.safetensors",
        "BEATs.pt",
        "adapter_model.safetensors",
    }
    crab = tuple(tmp_path / "crab" / name for name in ("finetune_weights.bin", "avs_finetune_weights.bin"))
    back = dataclasses.replace(
        files,
        clip=tmp_path / "hf/clip",
        llama=tmp_path / "hf/llama",
        tokenizer=None,
        beats=tmp_path / "hf/beats/BEATs.pt",
        crab=crab,
        seed=5,
    )
    report = import_weights(back, tmp_path / "again", choices)
    assert report["parameters"]["not_from_weight_files"] == {}  # our export also holds the position matrices
    trees = [digests.tree_hash(stored.load_params(folder)) for folder in (first, tmp_path / "again")]
    assert trees[0] == trees[1]  # paths, shapes, dtypes and bytes
    assert (first / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()
    for name in ("finetune_weights.bin", "avs_finetune_weights.bin"):  # and every tensor is the original one
        original, ours = (torch_file.read(path) for path in (files.crab[0].parent / name, tmp_path / "crab" / name))
        for key in set(original) & set(ours):
            np.testing.assert_array_equal(original[key], ours[key], err_msg=key)
    adapter = stored_tensors.read_safetensors(tmp_path / "hf/adapter/adapter_model.safetensors")
    assert set(adapter) == {key for key in torch_file.read(files.crab[0]) if ".lora_" in key}
    assert json.loads((tmp_path / "hf/adapter/adapter_config.json").read_text())["peft_type"] == "MULTI_HEAD_LORA"


def test_pretraining_files_import_too(files, choices, imported, tmp_path):
    """Bare names; their output matrix counts while there is no LoRA, their embeddings never."""
    first, _ = imported
    export(first, "crab", tmp_path)
    rows = torch_file.read(files.crab[1])["base_model.model.lm_head.weight"]

    def add_matrices(arrays):
        arrays |= {"lm_head.weight": rows + 1, "model.embed_tokens.weight": rows}

    rewrite(tmp_path / "visual_pretrain.bin", tmp_path / "visual.bin", add_matrices)
    crab = tuple(tmp_path / name for name in ("audio_pretrain.bin", "visual.bin", "segmentation_pretrain.bin"))
    stage = dataclasses.replace(files, crab=crab, fresh=("lora",), seed=3)
    report = import_weights(stage, tmp_path / "stage", choices)
    params = stored.load_params(tmp_path / "stage")
    tuned = stored.load_params(first)
    np.testing.assert_array_equal(params["vl_projector"]["proj_0"]["kernel"], tuned["vl_projector"]["proj_0"]["kernel"])
    np.testing.assert_array_equal(params["llama"]["lm_head"]["kernel"][:, : len(rows)], (rows + 1).T)
    assert "drop it" in str(report["sources"][str(tmp_path / "visual.bin")]["ignored"])
    drawn = report["parameters"]["not_from_weight_files"]
    assert any("embed_tokens/embedding rows" in path for path in drawn)
    assert not params["llama"]["layers"]["self_attn"]["q_proj"]["lora_B"].any()

    both = dataclasses.replace(files, crab=(crab[1], *files.crab))  # a fine-tuning file replaces what it holds
    report = import_weights(both, tmp_path / "both", choices)
    ignored = report["sources"][str(tmp_path / "visual.bin")]["ignored_keys"]
    assert "unused once LoRA" in ignored["base_model.model.lm_head.weight"]
    assert "replaced by" in ignored["base_model.model.model.vl_projector.visual_query_tokens"]


@pytest.mark.parametrize(
    ("dtype", "value"), [(np.float32, np.nan), (np.float16, np.inf), (ml_dtypes.bfloat16, -np.inf)]
)
def test_weights_that_are_no_numbers_are_counted_by_file_and_tensor(dtype, value, files, choices, tmp_path):
    def spoil(arrays):
        for key in ("lora_A", "lora_route"):
            name = ROUTE.replace("lora_route", key)
            arrays[name] = arrays[name].astype(dtype)
            arrays[name][0, :2] = value
        for name in arrays:
            if ".lora_" in name:
                arrays[name] = arrays[name].astype(dtype)

    path = rewrite(files.crab[0], tmp_path / "tuned.bin", spoil)
    with pytest.raises(InputError, match=r"2 tensors are not finite: .*tuned.bin: .*up_proj.lora_(A|route).weight has"):
        import_weights(dataclasses.replace(files, crab=(path, files.crab[1])), tmp_path / "out", choices)
    with pytest.raises(InputError):
        run_params.load_model(tmp_path / "out")


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_heads_are_read_from_shapes(heads, files, choices, tmp_path):
    path = rewrite(files.crab[0], tmp_path / "finetune_weights.bin", with_heads(heads))
    out = tmp_path / "out"
    report = import_weights(dataclasses.replace(files, crab=(path, files.crab[1])), out, choices)
    assert report["lora_heads"] == heads
    assert stored.load_params(out)["llama"]["layers"]["mlp"]["up_proj"]["lora_B"].shape[1] == heads
    export(out, "crab", tmp_path / "back")
    ours, original = torch_file.read(tmp_path / "back/finetune_weights.bin"), torch_file.read(path)
    for key in ours:
        np.testing.assert_array_equal(ours[key], original[key])


def test_a_mixed_pair_of_heads_is_refused(files, choices, tmp_path):
    def half(arrays):
        with_heads(5)(arrays)
        for key in [key for key in arrays if ".layers.0." not in key]:
            del arrays[key]

    other = rewrite(files.crab[0], tmp_path / "five.bin", half)
    with pytest.raises(InputError, match="finetune_weights.bin.*disagree.*five.bin: rank .*5 heads"):
        import_weights(dataclasses.replace(files, crab=(*files.crab, other)), tmp_path, choices)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_storage_dtypes_and_torch_shards_are_kept(dtype, files, choices, tmp_path):
    """A directory of .bin shards in half precision; the LoRA on top is float32."""
    llama = tmp_path / "llama"
    llama.mkdir()
    tensors = {k: v.astype(dtype) for k, v in torch_file.read_model_dir(files.llama).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)  # older directories hold it
    names = list(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for shard, held in shards.items():
        torch_writer.save(
            llama / shard, {k: Tensor(tensors[k].shape, tensors[k].dtype, lambda k=k: tensors[k]) for k in held}
        )
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (llama / "config.json").write_text((files.llama / "config.json").read_text())
    report = import_weights(dataclasses.replace(files, llama=llama), tmp_path / "out", choices)
    params = stored.load_params(tmp_path / "out")
    kernel = params["llama"]["layers"]["mlp"]["up_proj"]
    assert kernel["kernel"].dtype == dtype and kernel["lora_A"].dtype == np.float32
    np.testing.assert_array_equal(kernel["kernel"][1], tensors["model.layers.1.mlp.up_proj.weight"].T)
    assert set(report["parameters"]["dtypes"]) == {"float32", np.dtype(dtype).name}
    export(tmp_path / "out", "hf", tmp_path / "hf")
    back = torch_file.read_model_dir(tmp_path / "hf/llama")
    for name in ("model.norm.weight", "model.layers.1.self_attn.o_proj.weight"):
        np.testing.assert_array_equal(back[name], tensors[name])

    (llama / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="pytorch_model-00002-of-00002.bin"):
        import_weights(dataclasses.replace(files, llama=llama), tmp_path / "again", choices)


def test_a_tied_language_model_is_refused(files, choices, tmp_path):
    """Its files lack the output matrix; Crab trains and saves embedding and output matrix apart."""
    config = json.loads((files.llama / "config.json").read_text())
    tensors = {k: v for k, v in torch_file.read_model_dir(files.llama).items() if k != "lm_head.weight"}
    torch_writer.save_safetensors(
        tmp_path / "model.safetensors", {k: Tensor(v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()}
    )
    for tied, problem in (
        (True, "config.json .tie_word_embeddings.*a matrix of its own"),
        (False, r"\[lm_head.weight\]: 1 tensors are missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        with pytest.raises(InputError, match=problem) as caught:
            import_weights(dataclasses.replace(files, llama=tmp_path), tmp_path / "out", choices)
        assert str(tmp_path) in str(caught.value)


def test_what_was_never_saved_is_supplied_or_drawn_and_said(golden, files, choices, imported, tmp_path):
    unsaved = golden / "weights/crab/unsaved_state.npz"
    text_only = dataclasses.replace(files, crab=files.crab[:1], fresh=("seg_module",), seed=7)
    reports, trees = {}, {}
    for name, options in {"drawn": {}, "again": {}, "other": {"seed": 8}, "rows": {"token_rows": unsaved}}.items():
        out = tmp_path / name
        reports[name] = import_weights(dataclasses.replace(text_only, **options), out, choices)
        trees[name] = stored.load_params(out)
    base = reports["drawn"]["sizes"]["llama"]["vocab_size"] - 17
    embed = {name: tree["llama"]["embed_tokens"]["embedding"] for name, tree in trees.items()}
    np.testing.assert_array_equal(embed["drawn"], embed["again"])
    np.testing.assert_array_equal(embed["drawn"][:base], embed["rows"][:base])
    new = {name: value[base : base + 17] for name, value in embed.items()}
    assert 0.01 < new["drawn"].std() < 0.03 and (new["drawn"] != new["other"]).any()
    np.testing.assert_array_equal(new["rows"], np.load(unsaved)["embed_tokens.new_rows"])
    assert not embed["drawn"][base + 17 :].any()
    notes = {name: report["parameters"]["not_from_weight_files"] for name, report in reports.items()}
    key = next(path for path in notes["rows"] if path.startswith("llama/embed_tokens"))
    assert "seed 7" in notes["drawn"][key] and "unsaved_state.npz" in notes["rows"][key]

    with pytest.raises(InputError, match="2 arrays match.*--state"):
        import_weights(dataclasses.replace(files, position_buffers=unsaved), tmp_path / "x", choices)
    import_weights(dataclasses.replace(files, position_buffers=unsaved, state="avs."), tmp_path / "x", choices)
    (matrix,) = stored.load_params(tmp_path / "x")["seg_module"]["pe_layer"].values()
    expected = np.load(unsaved)["avs.seg_module.pe_layer.positional_encoding_gaussian_matrix"]
    np.testing.assert_array_equal(matrix, expected)


def renamed(arrays):
    arrays[ROUTE.replace("lora_route", "lora_router")] = arrays.pop(ROUTE)


def reshaped(arrays):
    key = "base_model.model.model.vl_projector.visual_proj.0.weight"
    arrays[key] = arrays[key][:, :-1]


def extra(arrays):
    arrays["base_model.model.model.vl_projector.surprise"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (renamed, r"1 tensors are missing: .*lora_route.*1 keys of the files have no use: .*lora_router"),
        (lambda arrays: arrays.pop(ROUTE), r"up_proj.lora_route.weight\]: 1 tensors are missing"),
        (reshaped, r"visual_proj.0.weight\]: has shape \(\d+, \d+\).*the model wants \(\d+, \d+\)"),
        (extra, r"surprise.*1 keys have no use.*0 parameters have no source"),
    ],
)
def test_a_file_with_another_content_gives_one_clear_error(change, problem, files, choices, tmp_path):
    bad = rewrite(files.crab[0], tmp_path / "bad.bin", change)
    with pytest.raises(InputError, match=problem) as caught:
        import_weights(dataclasses.replace(files, crab=(bad, files.crab[1])), tmp_path / "out", choices)
    assert "bad.bin" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_model_is_not_written_over(files, choices, tmp_path):
    (tmp_path / models.PACKED).touch()
    with pytest.raises(InputError, match="holds another model"):
        import_weights(files, tmp_path, choices)


def test_wrong_and_damaged_files_are_named(files, choices, tmp_path):
    cut = tmp_path / "finetune_weights.bin"
    whole = files.crab[0].read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    for options, problem in (
        ({"crab": (cut,)}, "finetune_weights.bin.*not a whole PyTorch zip file"),
        ({"crab": (files.beats,)}, "holds no weights of Crab"),
        ({"crab": (files.clip / "model.safetensors",)}, "holds no weights of Crab"),
        ({"crab": files.crab[1:]}, "tensors are missing.*--fresh al_projector lora vl_projector"),
        ({"crab": files.crab[:1]}, "tensors are missing.*--fresh seg_module"),
        ({"llama": files.clip}, r"clip \[model.embed_tokens.weight\]: is missing"),
        ({"clip": files.llama}, "llama.config.json"),
        ({"clip": tmp_path}, "neither this file"),
        ({"beats": files.crab[0]}, "finetune_weights.bin.*layer_norm_first"),
        ({"fresh": ("everything",)}, "is no component"),
    ):
        with pytest.raises(InputError, match=problem):
            import_weights(dataclasses.replace(files, **options), tmp_path / "out", choices)
    with pytest.raises(InputError, match="--bert"):
        import_weights(files, tmp_path / "out", dataclasses.replace(choices, bert_heads=7))


def test_a_file_that_would_run_code_stops_the_import(files, tmp_path, capsys):
    evil, victim = tmp_path / "evil.bin", tmp_path / "victim"
    command = f"touch {victim}".encode()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr(
            "archive/data.pkl",
            b"\x80\x02}(X\x01\0\0\0xcos\nsystem\n(X" + struct.pack("<I", len(command)) + command + b"tRu.",
        )
    arguments = parser().parse_args(
        [
            "import",
            "--clip",
            str(files.clip),
            "--llama",
            str(files.llama),
            "--beats",
            str(files.beats),
            "--crab",
            str(evil),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    with pytest.raises(InputError, match=r"evil.bin \[archive/data.pkl\]: it refers to os.system"):
        main(arguments)
    assert not victim.exists()


def test_the_command_line(golden, files, choices, tmp_path, capsys):
    """The commands of docs/weights.md: import with every size option, verify against stored logits, export."""
    unsaved = str(golden / "weights/crab/unsaved_state.npz")
    bert = tmp_path / "bert.json"
    bert.write_text(json.dumps({"num_attention_heads": choices.bert_heads}))
    out = str(tmp_path / "out")
    main(
        parser().parse_args(
            [
                "import",
                "--clip",
                str(files.clip),
                "--llama",
                str(files.llama),
                "--beats",
                str(files.beats),
                "--crab",
                str(files.crab[0]),
                "--tokenizer",
                str(files.tokenizer),
                "--fresh",
                "seg_module",
                "--token-rows",
                unsaved,
                "--bert",
                str(bert),
                "--taps",
                ",".join(map(str, choices.taps)),
                "--lora-alpha",
                str(choices.lora_alpha),
                "--dtype",
                "float32",
                "--low-res",
                str(choices.low_res),
                "--out",
                out,
            ]
        )
    )
    said = capsys.readouterr().out
    assert "ignored" in said and "drawn from seed 0: seg_module/" in said and "compat released" in said
    main(parser().parse_args(["verify", out, "--outputs", str(golden / "llama.npz"), "--prefix", "lora."]))
    assert "top1 1" in capsys.readouterr().out
    with pytest.raises(InputError, match="mean KL"):
        main(parser().parse_args(["verify", out, "--outputs", str(golden / "llama.npz"), "--prefix", "base."]))
    with pytest.raises(InputError, match="is missing"):
        main(parser().parse_args(["verify", out, "--outputs", str(golden / "llama.npz")]))
    main(parser().parse_args(["export", out, "--format", "hf", "--out", str(tmp_path / "back")]))
    assert "BEATs.pt" in capsys.readouterr().out


@pytest.mark.slow
def test_predict_evaluate_and_train_take_an_import(files, imported, scenes_root, tmp_path, monkeypatch, capsys):
    """Each by its command line; what a step of training wrote is exported like an import."""
    checkpoint = str(imported[0])

    def ends_well(verb, *words):
        with pytest.raises(SystemExit) as stop:
            verb.main(words)
        assert stop.value.code == 0, capsys.readouterr().err

    example = next(e for e in read_jsonl(scenes_root / "test.jsonl") if e.task == "s4")
    ends_well(
        predict,
        "--checkpoint",
        checkpoint,
        "--task",
        "s4",
        "--video",
        str(scenes_root / example.video),
        "--second",
        "1",
        "--max-new-tokens",
        "7",
        "--force-masks",
        "--out",
        str(tmp_path / "asked"),
    )
    (answer,) = map(json.loads, (tmp_path / "asked/predictions.jsonl").read_text().splitlines())
    assert isinstance(answer["text"], str) and list((tmp_path / "asked").rglob("*.png"))
    ends_well(
        evaluate,
        "--checkpoint",
        checkpoint,
        "--data",
        str(scenes_root),
        "--tasks",
        "ave",
        "--limit",
        "1",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "scored"),
    )
    assert "ave" in json.loads((tmp_path / "scored/results.json").read_text())["tasks"]

    # The config that the import recorded: its sizes, and the preset of the weights; one task, so one compilation.
    recorded = json.loads((imported[0] / "config.json").read_text())
    recorded["data"]["weights"] = {task: float(task == "ave") for task in TASKS}
    stage = tmp_path / "stage.py"
    stage.write_text(f"from ml_collections import ConfigDict\n\nget_config = lambda: ConfigDict({recorded})\n")
    monkeypatch.setattr(
        "sys.argv",
        [
            "train",
            f"--config={stage}",
            f"--workdir={tmp_path / 'run'}",
            f"--config.init_from={checkpoint}",
            f"--config.tokenizer={checkpoint}",
            f"--config.data.root={scenes_root}",
            "--config.data.batch_size=1",
            "--config.steps=1",
            "--config.log_every=1",
            "--config.mesh.fsdp=1",
            "--config.optim.accumulate=1",
        ],
    )
    train.main()
    assert re.search(r"^step 1/1  loss \d", capsys.readouterr().out, re.MULTILINE)
    export(tmp_path / "run", "crab", tmp_path / "trained")
    ours, released = (torch_file.read(file) for file in (tmp_path / "trained/finetune_weights.bin", files.crab[0]))
    assert ROUTE in ours and all(ours[key].shape == released[key].shape for key in ours)


def test_an_import_that_ends_anywhere_leaves_the_older_one(files, choices, imported, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(imported[0], out)
    whole = digests.tree_hash(stored.load_params(out))
    other = dataclasses.replace(files, seed=99)
    for place in ("save_streamed", "note_model"):
        with monkeypatch.context() as patch:
            real = getattr(importing, place)

            def dies(*args, real=real, **options):
                real(*args, **options)
                raise KeyboardInterrupt

            patch.setattr(importing, place, dies)
            with pytest.raises(KeyboardInterrupt):
                import_weights(other, out, choices)
        assert digests.tree_hash(stored.load_params(out)) == whole, place
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_flipped_bit_of_an_import_is_named(imported, tmp_path):
    shutil.copytree(imported[0], tmp_path / "out")
    # Of the values, not of the description beside them, which may be as large.
    largest = max((tmp_path / "out" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(InputError, match="params .*are not those that were written"):
        stored.load_params(tmp_path / "out")
