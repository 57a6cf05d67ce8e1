"""The annotator against a server that answers well, wrongly, late, malformed, with 429 and 500: every answer is paid
for once, the key goes nowhere else, and a run can be stopped and continued at any time."""

import dataclasses
import email.utils
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from labelled import ALL, ONE_EACH
from stub_llm import Stub, completion, good, serving

from crab_jax.io.errors import InputError
from data_pipelines.av_uie import __main__ as commands
from data_pipelines.av_uie import annotate, labels, prompts, verify
from data_pipelines.examples import read_jsonl, write_jsonl

KEY = "sk-secret-0123456789"
WITHOUT_MASKS = [dataclasses.replace(one, mask=None) for one in ALL if one.task != "avcap"]


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between the tests and their server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def many(count):
    return [
        dataclasses.replace(ONE_EACH["ave"], id=f"clip-{i}", meta={"event": "Bark", "start": 0, "end": 1 + i % 10})
        for i in range(count)
    ]


@contextmanager
def asking(stub, path, **settings):
    """A client of the stub with a journal at `path`."""
    settings = {"key": KEY, "backoff": 0.01, "timeout": 5.0, "attempts": 4} | settings
    journal = annotate.Journal(path)
    try:
        yield annotate.Client(annotate.Endpoint(stub.url, "m", **settings), journal)
    finally:
        journal.close()


def run(stub, path, examples, progress=None, corrections=1, workers=4, **settings):
    with asking(stub, path, **settings) as client:
        return annotate.run(examples, client, None, corrections, workers, progress), client


def test_good_answers_become_verified_targets_in_order(tmp_path):
    with serving(Stub()) as stub:
        outcome, client = run(stub, tmp_path / "journal", ALL)
    assert [one.id for one in outcome.examples] == [one.id for one in ALL if one.task != "avcap"]
    assert verify.split(outcome.examples)[1] == []
    assert all(one.meta["reasoning"] == "llm:m" and labels.reasoning_of(one) for one in outcome.examples)
    assert set(stub.seen.values()) == {1} and not outcome.failed
    assert {r["path"] for r in stub.requests} == {"/v1/chat/completions"}
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in stub.headers)
    assert client.counts["tokens_in"] == 100 * len(outcome.examples)


def test_the_request_holds_the_facts_and_examples_of_the_task_only():
    turns = prompts.messages(ONE_EACH["ave"])
    assert turns[0]["role"] == "system" and len(turns) == 2 + 2 * 2
    assert [t["role"] for t in turns[1:]] == ["user", "assistant", "user", "assistant", "user"]
    assert "Church bell from 3 to 8" in turns[-1]["content"] and "<video>" not in turns[-1]["content"]
    assert prompts.messages(ONE_EACH["avss"])[1] == prompts.messages(ONE_EACH["ms3"])[1]


def unsteady(request, times):
    """Every request fails once, each in another way, and is then answered well."""
    way = int(request["messages"][-1]["content"].partition("0,")[2].partition(" ")[0]) % 8
    bad = [
        lambda: (500, "oops", {}),
        lambda: (429, {"error": "slow down"}, {"Retry-After": "0.1"}),
        lambda: (200, "{not json", {}),
        lambda: (200, {"choices": []}, {}),
        lambda: completion(None),
        lambda: (time.sleep(3.0), completion("too late"))[1],
        lambda: (503, "", {"Retry-After": "soon"}),
        lambda: (200, "", {"Content-Length": "50"}),
    ]
    return bad[way]() if times == 0 else good(request)


def test_every_passing_failure_is_tried_again(tmp_path):
    with serving(Stub(unsteady)) as stub:
        outcome, client = run(stub, tmp_path / "journal", many(8), workers=8, timeout=1.5)
    assert len(outcome.examples) == 8 and verify.split(outcome.examples)[1] == []
    assert set(stub.seen.values()) == {2} and client.counts["retried"] == 8
    # Two malformed replies, one without text, one late, one cut off: they may be billed, and are counted.
    assert client.journal.lost == 5


def test_a_reply_that_trickles_in_is_late_as_a_whole(tmp_path):
    class Slow(Stub):
        def handle(self, handler):
            handler.rfile.read(int(handler.headers["Content-Length"]))
            handler.send_response(200)
            handler.end_headers()
            for _ in range(100):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)

    with serving(Slow()) as stub, asking(stub, tmp_path / "j", timeout=0.3, attempts=1) as client:
        began = time.monotonic()
        with pytest.raises(annotate.Failure, match="timed out"):
            client.ask("x", prompts.messages(ONE_EACH["ave"]))
        assert time.monotonic() - began < 4  # of 5


def wrong(request):
    return completion(good(request)[1]["choices"][0]["message"]["content"].replace("Bark", "Truck"))


def test_a_wrong_answer_is_asked_for_again_with_the_reasons(tmp_path):
    with serving(Stub(lambda request, times: good(request) if "not agree" in str(request) else wrong(request))) as stub:
        outcome, client = run(stub, tmp_path / "journal", many(3))
        assert verify.split(outcome.examples)[1] == []
        assert len(stub.seen) == 6 and set(stub.seen.values()) == {1}
        correction = next(r for r in stub.requests if len(r["messages"]) > 6)["messages"]
        assert "the event is 'Truck', the label says 'Bark'" in correction[-1]["content"]
        again, client = run(stub, tmp_path / "journal", many(3))
    assert again == outcome and client.counts["asked"] == 0 and client.counts["cached"] == 6


def test_an_answer_that_stays_wrong_is_kept_and_quarantined(tmp_path):
    with serving(Stub(lambda request, times: wrong(request))) as stub:
        outcome, client = run(stub, tmp_path / "journal", many(2), corrections=2)
    assert client.counts["asked"] == 6
    good_ones, bad = verify.split(outcome.examples)
    assert good_ones == [] and len(bad) == 2 and "the event is 'Truck', the label says 'Bark'" in bad[0][1]


def test_a_request_that_is_refused_fails_alone(tmp_path):
    def behave(request, times):
        return (400, "content filter", {}) if "0,3 <" in request["messages"][-1]["content"] else good(request)

    with serving(Stub(behave)) as stub:
        outcome, _ = run(stub, tmp_path / "journal", many(6))
        assert len(outcome.examples) == 5 and outcome.failed == {"clip-2": "HTTP 400 (content filter)"}
        assert set(stub.seen.values()) == {1}  # a refusal is not tried again


def test_a_dead_endpoint_stops_the_run(tmp_path):
    with serving(Stub(lambda request, times: (500, "down", {}))) as stub:
        with pytest.raises(InputError, match="has not answered"):
            run(stub, tmp_path / "journal", many(60), workers=2, attempts=2)
        assert sum(stub.seen.values()) < 40


@pytest.mark.parametrize(
    ("status", "body", "fix"),
    [
        (401, f"Incorrect API key provided: {KEY}", "environment variable"),
        (403, "no", "environment variable"),
        (404, "no such model", "--model"),
        (402, "pay", "credit"),
        (429, {"error": {"code": "insufficient_quota"}}, "credit"),
    ],
)
def test_what_no_retry_can_mend_stops_at_once_without_the_key(tmp_path, status, body, fix):
    with serving(Stub(lambda request, times: (status, body, {}))) as stub, pytest.raises(InputError) as caught:
        run(stub, tmp_path / "journal", many(20), workers=2)
    assert fix in caught.value.fix and KEY not in str(caught.value)
    assert sum(stub.seen.values()) <= 2


def test_a_redirect_is_not_followed_so_the_key_stays_here(tmp_path):
    with serving(Stub()) as elsewhere:
        target = f"{elsewhere.url}/chat/completions"
        with (
            serving(Stub(lambda request, times: (307, "", {"Location": target}))) as stub,
            pytest.raises(InputError, match="HTTP 307"),
        ):
            run(stub, tmp_path / "journal", many(1))
    assert elsewhere.requests == []


@pytest.mark.parametrize(
    "settings",
    [
        {"url": f"https://user:{KEY}@host/v1"},
        {"url": f"https://host/v1?key={KEY}"},
        {"url": "file:///etc/passwd"},
        {"url": "host/v1"},
        {"url": "https://[bad/v1"},
        {"key": f"{KEY}\n"},
        {"key": f"{KEY} x"},
        {"key": f"{KEY}\u2026"},
        {"model": ""},
        {"budget": 1.0},
    ],
)
def test_bad_settings_are_named_without_the_key(settings):
    with pytest.raises(InputError) as caught:
        annotate.Endpoint(**({"url": "https://host/v1", "model": "m", "key": KEY} | settings))
    assert KEY not in str(caught.value)
    assert KEY not in repr(annotate.Endpoint("https://host/v1", "m", KEY))


def test_a_server_that_repeats_the_key_does_not_get_it_into_the_journal(tmp_path):
    with serving(Stub(lambda request, times: completion(f"Bearer {KEY}"))) as stub:
        outcome, _ = run(stub, tmp_path / "journal", many(1), corrections=0)
    assert outcome.examples[0].target == "Bearer ***" and KEY not in (tmp_path / "journal").read_text()


def interrupt_after(count):
    """A progress that is interrupted once."""
    left = [KeyboardInterrupt]

    def progress(done):
        if done >= count and left:
            raise left.pop()

    return progress


def test_ctrl_c_keeps_what_is_under_way_and_a_restart_asks_only_for_the_rest(tmp_path):
    def slow(request, times):
        time.sleep(0.1)
        return good(request)

    with serving(Stub(slow)) as stub:
        with pytest.raises(KeyboardInterrupt):
            run(stub, tmp_path / "journal", many(40), interrupt_after(5), workers=3)
        answered = len((tmp_path / "journal").read_text().splitlines())
        assert 5 <= answered == sum(stub.seen.values()) < 40  # each request that was sent is in the journal
        outcome, client = run(stub, tmp_path / "journal", many(40))
        assert len(outcome.examples) == 40 and client.counts["cached"] == answered
        assert sum(stub.seen.values()) == 40


def test_ctrl_c_twice_leaves_at_once(tmp_path):
    def stuck(request, times):
        time.sleep(10)
        return good(request)

    def progress(done):
        raise KeyboardInterrupt

    with serving(Stub(stuck)) as stub:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(stub, tmp_path / "journal", many(4), progress)
        assert time.monotonic() - began < 5


def test_a_killed_process_loses_at_most_what_was_under_way(tmp_path):
    def slow(request, times):
        time.sleep(0.1)
        return good(request)

    workers, examples = 3, many(30)
    write_jsonl(tmp_path / "plain.jsonl", examples)
    out, journal = tmp_path / "llm.jsonl", tmp_path / "llm.jsonl.journal"
    with serving(Stub(slow)) as stub:
        arguments = [
            "annotate",
            "--examples",
            str(tmp_path / "plain.jsonl"),
            "--out",
            str(out),
            "--url",
            stub.url,
            "--model",
            "m",
            "--workers",
            str(workers),
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "data_pipelines.av_uie", *arguments],
            env={**os.environ, "AV_UIE_API_KEY": KEY},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        while not journal.is_file() or journal.read_bytes().count(b"\n") < 6:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        said = b"".join(process.communicate())
        time.sleep(0.5)  # the stub finishes what it was doing
        first = sum(stub.seen.values())
        kept = journal.read_bytes().count(b"\n")
        assert first - kept <= workers and not out.exists()
        with pytest.raises(SystemExit) as stopped:
            commands.main(arguments)
        assert stopped.value.code == 0
    assert [one.id for one in read_jsonl(out)] == [one.id for one in examples]
    assert sum(stub.seen.values()) - first == len(examples) - kept  # nothing in the journal was asked again
    everything = said + b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert KEY.encode() not in everything


def test_a_schedulers_stop_is_as_clean_as_ctrl_c(tmp_path, capsys):
    def behave(request, times):
        if sum(stub.seen.values()) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return good(request)

    write_jsonl(tmp_path / "plain.jsonl", many(40))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with serving(Stub(behave)) as stub, pytest.raises(SystemExit) as stopped:
            commands.main(
                [
                    "annotate",
                    "--examples",
                    str(tmp_path / "plain.jsonl"),
                    "--out",
                    str(tmp_path / "out"),
                    "--url",
                    stub.url,
                    "--model",
                    "m",
                    "--workers",
                    "2",
                ]
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 1 and "stopping" in capsys.readouterr().err
    answered = (tmp_path / "out.journal").read_text().splitlines()
    assert 3 <= len(answered) == sum(stub.seen.values()) < 40


def record(id, text="t"):
    return {"id": id, "request": "r", "model": "m", "text": text, "tokens_in": 1, "tokens_out": 2, "estimated": False}


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "journal"
    path.write_text(json.dumps(record("a")) + "\n" + json.dumps(record("b"))[:30])
    journal = annotate.Journal(path)
    assert set(journal.answers) == {("a", "r")}
    journal.add(record("c", "schön"))
    journal.close()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_a_damaged_line_is_named_and_two_runs_exclude_each_other(tmp_path):
    path = tmp_path / "journal"
    path.write_text(json.dumps(record("a")) + "\n{}\n")
    with pytest.raises(InputError, match=r"journal:2"):
        annotate.Journal(path)
    journal = annotate.Journal(tmp_path / "other")
    with pytest.raises(InputError, match="in use"):
        annotate.Journal(tmp_path / "other")
    journal.close()
    annotate.Journal(tmp_path / "other").close()


def test_an_answer_after_the_end_is_written_nowhere(tmp_path):
    journal = annotate.Journal(tmp_path / "journal")
    journal.close()
    with open(tmp_path / "other", "w+b") as other:  # takes the journal's file number
        with pytest.raises(OSError):
            journal.add(record("late"))
        assert other.read() == b""


def test_another_model_or_parameter_is_another_request():
    turns = prompts.messages(ONE_EACH["ave"])
    hashes = {
        annotate.Endpoint("https://host/v1", model, parameters=parameters).request_hash(turns)
        for model in ("a", "b")
        for parameters in ({"temperature": 0}, {"temperature": 1})
    }
    assert len(hashes) == 4
    same = annotate.Endpoint("https://elsewhere/v1", "a", "key", {"temperature": 0}).request_hash(turns)
    assert same in hashes  # where it is asked, and with which key, changes no answer


def test_no_more_requests_at_a_time_or_a_minute_than_allowed(tmp_path):
    def slow(request, times):
        time.sleep(0.1)
        return good(request)

    with serving(Stub(slow)) as stub:
        run(stub, tmp_path / "a", many(12), workers=3)
        assert 1 < stub.busiest <= 3
        began = time.monotonic()
        run(stub, tmp_path / "b", many(12), workers=12, per_minute=1200)
    assert time.monotonic() - began >= 11 * 60 / 1200


def test_a_server_that_asks_for_a_pause_gets_it_from_all_workers(tmp_path):
    def behave(request, times):
        return (429, "", {"Retry-After": "0.4"}) if len(stub.times) == 1 else good(request)

    with serving(Stub(behave)) as stub:
        run(stub, tmp_path / "journal", many(3), workers=1)
    assert stub.times[1] - stub.times[0] >= 0.39
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < annotate._retry_after(later) <= 30 and annotate._retry_after("soon") == 0


def test_the_budget_is_never_exceeded_and_a_higher_one_goes_on(tmp_path):
    prices = {"price_in": 10.0, "price_out": 50.0}  # of a million tokens: each reply of the stub costs 0.002
    with serving(Stub()) as stub:
        with pytest.raises(InputError, match="--budget"):
            run(stub, tmp_path / "journal", many(30), budget=0.06, **prices)
        asked = sum(stub.seen.values())
        assert 0 < asked * 0.002 <= 0.06 and asked < 30
        outcome, client = run(stub, tmp_path / "journal", many(30), budget=1.0, **prices)
    assert len(outcome.examples) == 30 and client.counts["cached"] == asked
    assert client.spent() == pytest.approx(30 * 0.002)  # earlier runs included


def test_usage_that_the_server_does_not_report_is_estimated(tmp_path):
    with serving(
        Stub(lambda request, times: completion(good(request)[1]["choices"][0]["message"]["content"], None))
    ) as stub:
        _, client = run(stub, tmp_path / "journal", many(1))
    reply = next(iter(client.journal.answers.values()))
    assert reply.estimated and reply.tokens_in == annotate.tokens_in(prompts.messages(many(1)[0]))


def test_an_estimate_asks_nothing(tmp_path, capsys):
    write_jsonl(tmp_path / "plain.jsonl", WITHOUT_MASKS)
    with serving(Stub()) as stub, pytest.raises(SystemExit) as stopped:
        commands.main(
            [
                "annotate",
                "--examples",
                str(tmp_path / "plain.jsonl"),
                "--url",
                stub.url,
                "--model",
                "m",
                "--price-in",
                "1",
                "--estimate",
            ]
        )
    found = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0 and stub.requests == []
    assert found["requests"] == len(WITHOUT_MASKS) and found["cost"] == pytest.approx(found["tokens_in"] / 1e6)


def test_the_command_reports_failures_in_one_line_and_never_the_key(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    write_jsonl(tmp_path / "plain.jsonl", many(2))
    with serving(Stub(lambda request, times: (401, f"bad key {KEY}", {}))) as stub, pytest.raises(SystemExit) as end:
        commands.main(
            [
                "annotate",
                "--examples",
                str(tmp_path / "plain.jsonl"),
                "--out",
                str(tmp_path / "out.jsonl"),
                "--url",
                stub.url,
                "--model",
                "m",
                "--key-env",
                "MY_KEY",
            ]
        )
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.startswith("error: the endpoint: refuses the key: HTTP 401 (bad key ***)")
    assert KEY not in said.out + said.err and not (tmp_path / "out.jsonl").exists()
