import re
from pathlib import Path

import pytest
import yaml

from multitask_kd import build, config
from multitask_kd.errors import UserError
from multitask_kd.experiments import study_config

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
STUDIES = sorted((CONFIGS / "studies").glob("*.yaml"))
SOFT = {"loss": "kl"}


@pytest.fixture
def write(tmp_path):
    def put(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return put


def fault(load, *args):
    with pytest.raises(UserError) as error:
        load(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("raw", "where", "nearest"),
    [
        ({"trian": {"steps": 3}}, "trian", "train"),
        ({"train": {"stesp": 3}}, "train.stesp", "steps"),
        ({"train": {"optimizer": {"weight_deacy": 0}}}, "train.optimizer.weight_deacy", "weight_decay"),
        ({"data": {"augment": {"flipp": 1}}}, "data.augment.flipp", "flip"),
        ({"data": {"labeled": 3}}, "data.labeled", "labelled"),
        ({"model": {"widht": 8}}, "model.widht", "width"),
        ({"tasks": {"seg": {"aplha": 0.5}}}, "tasks.seg.aplha", "alpha"),
        ({"tasks": {"det": {"soft": {"loss": "det_mse", "wieght": 1}}}}, "tasks.det.soft.wieght", "weight"),
        ({"teacher": {"path": "x.pt", "sorce": "checkpoint"}}, "teacher.sorce", "source"),
        ({"eval": {"pictres": 1}}, "eval.pictres", "pictures"),
    ],
)
def test_a_typo_names_file_key_and_nearest_key(write, raw, where, nearest):
    path = write("cfg.yaml", raw)
    assert fault(config.load, path) == f"{path}: {where}: unknown key; did you mean '{nearest}'?"


@pytest.mark.parametrize(
    ("override", "where", "nearest"),
    [
        ("trian.steps=3", "trian", "train"),
        ("train.optimizer.lrr=1", "train.optimizer.lrr", "lr"),
        ("runn=1", "runn", "run"),
    ],
)
def test_a_typo_in_an_override(write, override, where, nearest):
    path = write("cfg.yaml", {})
    assert fault(config.load, path, [override]) == f"{path}: {where}: unknown key; did you mean '{nearest}'?"


def test_a_key_far_from_every_other_lists_what_there_is(write):
    path = write("cfg.yaml", {"teacher": {"path": "x.pt", "zzzzzzzz": 1}})
    assert fault(config.load, path).endswith(
        "teacher.zzzzzzzz: unknown key; known: amp, check_images, classes, floor, input, map, options, "
        "outputs, path, source, tasks, trust_pickle"
    )


def test_every_fault_is_told_at_once(write):
    path = write("cfg.yaml", {"train": {"stesp": 3, "clip": -1}, "run": {"seed": "a"}})
    lines = fault(config.load, path).splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{path}: ") for line in lines)
    assert {line.split(": ")[1] for line in lines} == {"train.stesp", "train.clip", "run.seed"}


@pytest.mark.parametrize(
    ("override", "where", "given"),
    [
        ("train.steps=many", "train.steps", "'many'"),
        ("train.steps=0", "train.steps", "0"),
        ("train.steps=1.5", "train.steps", "1.5"),
        ("train.optimizer.lr=-1", "train.optimizer.lr", "-1"),
        ("train.optimizer.lr=.nan", "train.optimizer.lr", "nan"),
        ("train.optimizer.name=adam", "train.optimizer.name", "'adam'"),
        ("train.ema=1", "train.ema", "1"),
        ("train.amp=fp8", "train.amp", "'fp8'"),
        ("run.dir=5", "run.dir", "5"),
        ("run.seed=-1", "run.seed", "-1"),
        ("model.width=[8]", "model.width", "[8]"),
        ("model.strides=8", "model.strides", "8"),
        ("model.std=[0, 1, 1]", "model.std.0", "0"),
        ("data.augment.scale=[1, 2, 3]", "data.augment.scale", "[1, 2, 3]"),
        ("data.augment.flip=2", "data.augment.flip", "2"),
        ("data.train=scenes", "data.train", "'scenes'"),
        ("data.labelled=1.5", "data.labelled", "1.5"),
        ("data.on_error=ignore", "data.on_error", "'ignore'"),
        ("tasks=null", "tasks", "None"),
        ("tasks={}", "tasks", "{}"),
        ("tasks.seg=3", "tasks.seg", "3"),
        ("tasks.seg.alpha=x", "tasks.seg.alpha", "'x'"),
        ("teacher=best.pt", "teacher", "'best.pt'"),
    ],
)
def test_a_wrong_value_names_key_and_value(write, override, where, given):
    path = write("cfg.yaml", {})
    message = fault(config.load, path, [override])
    assert message.startswith(f"{path}: {where}: ") and f"(given: {given})" in message


def test_base_files_merge_key_by_key(write):
    write(
        "deep/base.yaml",
        {"train": {"steps": 7, "clip": 1}, "tasks": {"seg": {"ratio": 4}, "det": {}}, "model": {"width": 8}},
    )
    write("middle.yaml", {"base": "deep/base.yaml", "train": {"steps": 8}, "tasks": {"seg": {"alpha": 0}}})
    top = write(
        "top.yaml", {"base": "middle.yaml", "train": {"batch_size": 2}, "model": {"strides": [8, 16]}}
    )
    found = config.load(top, ["train.clip=2"])
    assert (found.train.steps, found.train.clip, found.train.batch_size) == (8, 2, 2)
    assert found.tasks["seg"].ratio == 4 and set(found.tasks) == {"seg", "det"}
    assert found.model.width == 8 and found.model.strides == (8, 16)


def test_a_section_of_another_component_replaces_the_one_below(write):
    scenes = {"layout": "scenes", "split": "train", "count": 9}
    write(
        "base.yaml",
        {
            "data": {"train": scenes},
            "tasks": {"seg": {"soft": {"loss": "kl", "options": {"temperature": 2}}}},
        },
    )
    top = {
        "base": "base.yaml",
        "data": {"train": {"layout": "coco", "images": "x"}},
        "tasks": {"seg": {"soft": {"loss": "cwd"}}},
    }
    found = config.load(write("top.yaml", top))
    assert found.data.train == {"layout": "coco", "images": "x"}
    assert found.tasks["seg"].soft.options == {}
    top["data"]["train"] = {"count": 3}
    top["tasks"]["seg"]["soft"] = {"options": {"reduction": "mean"}}
    found = config.load(write("top.yaml", top))
    assert found.data.train == scenes | {"count": 3}
    assert found.tasks["seg"].soft.options == {"temperature": 2, "reduction": "mean"}


def test_a_typo_in_a_base_file_is_told(write):
    write("base.yaml", {"train": {"stpes": 7}})
    assert "train.stpes: unknown key; did you mean 'steps'?" in fault(
        config.load, write("top.yaml", {"base": "base.yaml"})
    )


def test_a_missing_file_offers_the_nearest(write, tmp_path):
    write("scenes.yaml", {})
    message = fault(config.load, tmp_path / "scense.yaml")
    assert message.startswith(f"{tmp_path / 'scense.yaml'}: there is no such config file")
    assert f"did you mean '{tmp_path / 'scenes.yaml'}'?" in message
    assert "there is no such config file" in fault(config.load, tmp_path / "nowhere" / "x.yaml")


def test_base_missing_in_a_circle_or_no_path(write, tmp_path):
    assert str(tmp_path / "gone.yaml") in fault(config.load, write("a.yaml", {"base": "gone.yaml"}))
    write("a.yaml", {"base": "b.yaml"})
    write("b.yaml", {"base": "c.yaml"})
    assert "circle" in fault(config.load, write("c.yaml", {"base": "a.yaml"}))
    assert "circle" in fault(config.load, write("self.yaml", {"base": "self.yaml"}))
    for bad in ([], [3], {"a": "b.yaml"}):
        assert "base: the path of a YAML file, or a list of paths, is needed" in fault(
            config.load, write("a.yaml", {"base": bad})
        )


def test_several_bases_and_files_over_them_merge_in_order(write):
    one = write("one.yaml", {"train": {"steps": 1, "batch_size": 1, "log_every": 1, "save_every": 1}})
    write("two.yaml", {"train": {"steps": 2, "batch_size": 2, "log_every": 2}})
    top = write("top.yaml", {"base": ["one.yaml", "two.yaml"], "train": {"log_every": 3}})
    over = write("over.yaml", {"train": {"batch_size": 4}})
    got = config.load(top, ["train.steps=5"], over=[over]).train
    assert (got.steps, got.batch_size, got.log_every, got.save_every) == (5, 4, 3, 1)
    assert config.load(one).train.batch_size == 1


@pytest.mark.parametrize("text", ["a: [", "train:\n\tsteps: 3\n", "- 1\n", "word\n"])
def test_what_is_not_a_mapping_of_sections_names_the_file(write, text):
    path = write("cfg.yaml", text)
    assert fault(config.load, path).startswith(f"{path}: ")


def test_an_empty_file_is_all_defaults(write):
    assert config.load(write("cfg.yaml", "")) == config.Config()


def test_yaml_never_makes_objects(write, tmp_path):
    made = tmp_path / "made"
    message = fault(config.load, write("cfg.yaml", f"run: !!python/object/apply:os.mkdir ['{made}']\n"))
    assert "not valid YAML" in message and not made.exists()


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.optimizer.lr=1e-3", lambda c: c.train.optimizer.lr == 1e-3),
        ("train.optimizer.lr=2.5E-2", lambda c: c.train.optimizer.lr == 0.025),
        ("train.steps=5", lambda c: c.train.steps == 5),
        ("model.strides=[8, 16]", lambda c: c.model.strides == (8, 16)),
        ("data.augment.scale=[5e-1, 2]", lambda c: c.data.augment.scale == (0.5, 2.0)),
        ("train.eval_every=null", lambda c: c.train.eval_every is None),
        ("train.eval_every=", lambda c: c.train.eval_every is None),
        ("run.dir=a=b", lambda c: c.run.dir == "a=b"),
        ("run.channels_last=false", lambda c: c.run.channels_last is False),
        ("data.labelled=3", lambda c: c.data.labelled == 3 and isinstance(c.data.labelled, int)),
        ("data.labelled=1", lambda c: c.data.labelled == 1 and isinstance(c.data.labelled, int)),
        ("data.labelled=1.0", lambda c: c.data.labelled == 1 and isinstance(c.data.labelled, float)),
        ("data.labelled=5e-1", lambda c: c.data.labelled == 0.5),
        ("tasks.seg.soft.options.temperature=4", lambda c: c.tasks["seg"].soft.options == {"temperature": 4}),
        ("teacher.path=x.pt", lambda c: c.teacher.path == "x.pt"),
        (" train.steps = 5", lambda c: c.train.steps == 5),
        ("run.dir=nan", lambda c: c.run.dir == "nan"),
        ("run.dir='1e3'", lambda c: c.run.dir == "1e3"),
        (
            "tasks.seg.soft={loss: kl, options: {temperature: 5e-1}}",
            lambda c: c.tasks["seg"].soft.options == {"temperature": 0.5},
        ),
    ],
)
def test_overrides_are_yaml_values(write, override, read):
    path = write("cfg.yaml", {"train": {"eval_every": 3}, "tasks": {"seg": {"soft": SOFT}, "det": {}}})
    assert read(config.load(path, [override]))


def test_exponents_are_numbers_in_files_too(write):
    text = "train: {optimizer: {lr: 1e-3}}\ntasks: {seg: {soft: {loss: kl, options: {temperature: 2E+0, more: .5e1}}}}\n"
    found = config.load(write("cfg.yaml", text))
    assert found.train.optimizer.lr == 1e-3 and found.tasks["seg"].soft.options == {
        "temperature": 2.0,
        "more": 5.0,
    }


def test_a_key_that_is_there_twice(write):
    path = write("cfg.yaml", "train:\n  steps: 3\nrun: {seed: 1}\ntrain:\n  clip: 1\n")
    message = fault(config.load, path)
    assert (
        message.startswith(f"{path}: ")
        and "the key 'train' is there twice" in message
        and "line 4" in message
    )


def test_anchors_and_merge_keys_work(write):
    text = "model: &m {width: 8}\ndata: {train: &t {layout: scenes, count: 3}, val: {<<: *t, <<: {split: val}}}\n"
    found = config.load(write("cfg.yaml", text))
    assert found.data.val == {"layout": "scenes", "count": 3, "split": "val"}


def test_an_override_keeps_the_rest_of_a_default(write):
    found = config.load(write("cfg.yaml", {}), ["tasks.seg.ratio=3", "data.train.count=5"])
    default = config.Config()
    assert list(found.tasks) == ["seg", "det"] and found.tasks["seg"].ratio == 3
    assert found.data.train == default.data.train | {"count": 5} and found.data.val == default.data.val
    found = config.load(write("cfg.yaml", {"tasks": {"seg": {}}}), ["tasks.seg.ratio=3"])
    assert list(found.tasks) == ["seg"]  # what the file lists is all there is


def test_an_override_of_a_name_drops_the_options_of_the_old_one(write):
    path = write(
        "a.yaml", {"tasks": {"seg": {"soft": {"loss": "kl", "weight": 2, "options": {"temperature": 4}}}}}
    )
    read = lambda *overrides: config.load(path, overrides).tasks["seg"].soft  # noqa: E731
    assert (
        read("tasks.seg.soft.loss=det_mse").options == {} and read("tasks.seg.soft.loss=det_mse").weight == 1
    )
    assert read("tasks.seg.soft.loss=kl").options == {"temperature": 4}
    assert config.load(path, ["data.train.layout=coco", "data.train.root=x"]).data.train == {
        "layout": "coco",
        "root": "x",
    }


def test_the_last_override_wins_and_its_neighbours_stay(write):
    path = write("cfg.yaml", {"train": {"steps": 3, "clip": 1}})
    found = config.load(path, ["train.steps=4", "train.steps=5"])
    assert (found.train.steps, found.train.clip) == (5, 1)


@pytest.mark.parametrize(("override", "said"), [
    ("train.steps", "write it as key=value"),
    ("=3", "write it as key=value"),
    ("train.steps=[", "not valid YAML"),
    ("train.steps.more=3", "'steps' is a value, not a section"),
])  # fmt: skip
def test_a_malformed_override_is_shown(write, override, said):
    message = fault(config.load, write("cfg.yaml", {"train": {"steps": 3}}), [override])
    assert f"override '{override}'" in message and said in message


def test_alpha_needs_a_soft_loss_and_a_teacher():
    alone = {"tasks": {"seg": {"alpha": 0.5}}, "teacher": {"path": "x.pt"}}
    message = fault(config.parse, alone, "cfg.yaml")
    assert message.startswith("cfg.yaml: tasks.seg: ") and "no soft loss" in message
    message = fault(config.parse, {"tasks": {"seg": {"alpha": 0.5, "soft": SOFT}}}, "cfg.yaml")
    assert message.startswith("cfg.yaml: ") and "teacher.path" in message
    assert config.parse(
        {"tasks": {"seg": {"alpha": 0.5, "soft": SOFT}}, "teacher": {"path": "x.pt"}}, "cfg.yaml"
    )
    assert config.parse({"tasks": {"seg": {"alpha": 0, "soft": SOFT}}}, "cfg.yaml").teacher is None


@pytest.mark.parametrize("strides", [[8, 4], [4, 4, 8], [4, 6], [1, 2], [0, 4]])
def test_strides_are_rising_powers_of_two(strides):
    assert "strides" in fault(config.parse, {"model": {"strides": strides}}, "cfg.yaml")


def test_the_input_is_a_multiple_of_the_largest_stride():
    message = fault(config.parse, {"data": {"input_size": [96, 120]}}, "cfg.yaml")
    assert "data.input_size" in message and "[96, 120]" in message and "32" in message
    assert config.parse({"data": {"input_size": [96, 120]}, "model": {"strides": [4, 8]}}, "cfg.yaml")


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError):
        config.Config().train.steps = 3


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_shipped_recipes_are_sound(path, monkeypatch):
    for name in ("CAMVID", "PENNFUDAN"):
        monkeypatch.delenv(name, raising=False)
    found = config.load(path)
    build.check(build.without_start(found))
    again = yaml.safe_load(config.dump(found))
    assert config.parse(again, "dumped") == found


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_shipped_studies_are_sound(path):
    study, configs = study_config.load_study(path)
    folders = [c.run.dir for runs in configs.values() for c in runs.values()]
    assert len(folders) == len(set(folders)) and all(f.startswith(study.dir) for f in folders)
    for name, runs in configs.items():
        for seed, found in runs.items():
            build.check(build.without_start(found))
            assert found.run.seed == seed
        for control in study.runs[name].controls:
            # what is compared differs in the teacher and what it teaches, in nothing that makes the network
            # or the schedule
            for seed in set(runs) & set(configs[control]):
                assert (
                    runs[seed].model == configs[control][seed].model
                    and runs[seed].train == configs[control][seed].train
                )
                assert runs[seed].data.val == configs[control][seed].data.val
    taught = [t.path for runs in configs.values() for c in runs.values() for t in c.named_teachers.values()]
    inside = {f"{folder}/best.pt" for folder in folders}
    assert taught and all(path in inside for path in taught)


def test_dump_and_load_give_the_same_config(write):
    raw = {
        "run": {"threads": 2, "dir": "runs/a b"},
        "data": {
            "labelled": 1.0,
            "train": {"layout": "coco", "void": [11], "x": None, "y": "1e-3", "z": "no"},
        },
        "model": {"strides": [8, 16]},
        "tasks": {"det": {"alpha": 0.3, "soft": {"loss": "det_mse", "options": {"temperature": 1e-05}}}},
        "teacher": {"path": "t.pt"},
        "train": {"optimizer": {"lr": 1e-05}},
    }
    found = config.parse(raw, "x")
    again = config.load(write("dumped.yaml", config.dump(found)))
    assert again == found
    assert isinstance(again.data.labelled, float) and again.data.train == raw["data"]["train"]
    assert config.dump(again) == config.dump(found)


def study(**changes):
    return {
        "dir": "runs/s",
        "title": "t",
        "runs": {"a": {"config": "run.yaml"}, "b": {"config": "run.yaml"}},
    } | changes


def test_study_makes_a_config_of_every_run_and_seed(write):
    write("run.yaml", {"train": {"steps": 9}})
    runs = {
        "teacher": {"config": "../run.yaml", "seeds": [4]},
        "taught": {
            "config": "../run.yaml",
            "overrides": ["teacher.path={dir}/teacher/best.pt", "train.steps=3"],
            "against": "teacher",
        },
    }
    found, configs = study_config.load_study(write("studies/s.yaml", study(seeds=[0, 1], runs=runs)))
    assert {name: list(of) for name, of in configs.items()} == {"teacher": [4], "taught": [0, 1]}
    assert configs["teacher"][4].run.dir == "runs/s/teacher" and configs["teacher"][4].run.seed == 4
    assert [c.run.dir for c in configs["taught"].values()] == ["runs/s/taught/seed0", "runs/s/taught/seed1"]
    assert configs["taught"][1].teacher.path == "runs/s/teacher/best.pt"
    assert (configs["teacher"][4].train.steps, configs["taught"][0].train.steps) == (9, 3)
    assert found.runs["taught"].against == "teacher"


def test_study_faults_name_the_place(write, tmp_path):
    write("run.yaml", {})
    path = write(
        "s.yaml",
        study(runs={"alone": {"config": "run.yaml"}, "b": {"config": "run.yaml", "against": "aolne"}}),
    )
    assert (
        fault(study_config.load_study, path)
        == f"{path}: runs.b.against: there is no run 'aolne'; did you mean 'alone'?"
    )
    path = write("s.yaml", study(titel="x"))
    assert "titel: unknown key; did you mean 'title'?" in fault(study_config.load_study, path)
    path = write("s.yaml", study(runs={"a": {"config": "run.yaml", "overides": []}}))
    assert "runs.a.overides: unknown key; did you mean 'overrides'?" in fault(study_config.load_study, path)
    path = write("s.yaml", study(runs={"a": {"config": "rnu.yaml"}}))
    assert f"{tmp_path / 'rnu.yaml'}: there is no such config file" in fault(study_config.load_study, path)
    path = write("s.yaml", study(runs={"a": {"config": "run.yaml", "overrides": ["train.stps=1"]}}))
    assert "train.stps: unknown key; did you mean 'steps'?" in fault(study_config.load_study, path)
    path = write("s.yaml", study(runs={}))
    assert "runs" in fault(study_config.load_study, path)


def test_the_files_that_the_readme_shows_are_sound(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.setenv("MY_DATA", "/data")
    (tmp_path / "configs").symlink_to(root / "configs")
    blocks = re.findall(
        r"```yaml\n# (\S+\.yaml)\b(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert [name for name, _ in blocks] == [
        "tasks.yaml", "ways.yaml", "mine.yaml", "mine_teacher.yaml", "mine_distilled.yaml", "partial.yaml",
        "classes.yaml",
    ]  # fmt: skip
    for name, text in blocks:
        (tmp_path / name).write_text("#" + text, encoding="utf-8")
    for name, _ in blocks:
        build.check(config.load(tmp_path / name))
    assert config.load(tmp_path / "mine_distilled.yaml").teacher.path == "runs/mine/teacher/best.pt"
