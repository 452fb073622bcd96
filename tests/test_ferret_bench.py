"""Ferret-Bench against a local server that speaks chat completions: answers, prompts, marks, kept replies, going on."""

import itertools
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from dataset_fixtures import put
from eval_fixtures import run, write_picture
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from encoder.errors import DataError
from eval import ferret_bench
from eval.compare import load_runs, refuse_different_protocol
from eval.ferret_bench import for_the_judge, marks_in, regions_of
from eval.judge import Judge
from eval.local_judge import LocalJudge
from eval.predictions import Target, load_evaluation
from eval.scoring import score_folder, score_run

MLLM = Path(__file__).parents[1] / "weights/mllm_cloc"


class Server(ThreadingHTTPServer):
    """Gives the reference 8 and the answer `marks[number]`, and keeps what it was asked; `failures` requests fail first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.failures, self.replies = [], 0, {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/elsewhere")
            return self.end_headers()
        if self.server.failures:
            self.server.failures -= 1
            return self.send_error(503 if body["model"] == "busy" else 401)
        asked = body["messages"][1]["content"]
        reply = next((text for part, text in self.server.replies.items() if part in asked), "8 4\nBecause.")
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers), None))
        self.send_error(404)

    def log_message(self, *arguments):
        """Nothing on the terminal."""


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Ferret-Bench's files with two questions a category, the description's folder under its older name."""
    folder = tmp_path_factory.mktemp("bench")
    for i in range(2):
        write_picture(folder / f"images/{i:012d}.png", 60, 40, i)
    for name, category in (("refer_caption", "refer_desc"), ("refer_reason", "refer_reason"), ("ground_conv", "ground_conv")):
        where = "" if category == "ground_conv" else " [0.100, 0.200, 0.500, 1.000]"
        rows = {
            "question": f"What is the purpose of the object{where}?",
            "context": "Objects:\nObject 0 : cup",
            "answer": "A cup",
        }
        for kind, text in rows.items():
            lines = (
                json.dumps({"question_id": i, "image": f"{i:012d}.png", "category": category, "text": f"{text} {i}"}) + "\n"
                for i in range(2)
            )
            put(folder / "data" / name / f"{kind}.jsonl", "".join(lines))
    rules = {c: {"role": "Assistant", "prompt": f"Rate {c}."} for c in ferret_bench.FOLDERS}
    put(folder / "data/rule.json", rules)
    flags = ["--model", MLLM, "--data", folder / "data", "--images", folder / "images", "--out", folder / "run"]
    run(ferret_bench, *flags, "--max-new-tokens", 8)
    return folder


def test_answers_are_marked_kept_and_gone_on_from(bench, server, capsys, monkeypatch):
    evaluation = load_evaluation(bench / "run/ferret_bench/refer_desc")
    assert evaluation.predictions[0].prompt == "What is the purpose of the object <region:0>? 0"
    score_run(bench / "run")
    assert capsys.readouterr().out.count("answered, not judged") == 3
    with pytest.raises(DataError, match="have not been judged; run eval/ferret_bench.py with --judge"):
        score_folder(bench / "run/ferret_bench/refer_desc")

    server.replies = {"Rate refer_reason.": "I cannot say.", "? 1": "10, 7.5\nfine"}
    monkeypatch.setenv("SOME_KEY", "secret")
    flags = ["--data", bench / "data", "--out", bench / "run", "--score-only", "--judge-url", server.url + "/"]
    flags += ["--judge", "m", "--judge-key", "SOME_KEY"]
    with pytest.raises(DataError, match="judge 'm': no reply begins with two marks"):
        run(ferret_bench, *flags)
    server.replies = {"Rate refer_reason.": "9 9", "? 1": "10, 7.5\nfine"}
    for kept in (bench / "run/ferret_bench/judge").glob("*.json"):
        if "I cannot say" in kept.read_text():
            kept.unlink()
    asked = len(server.requests)
    run(ferret_bench, *flags)
    assert len(server.requests) - asked == 4, "the two replies about refer_desc were kept"
    output = capsys.readouterr().out
    # (4 + 7.5) / (8 + 10), 1, and (4 + 7.5) / (8 + 10) again
    assert (
        "ferret_bench/refer_desc     63.9" in output and "refer_reason   100.0" in output and "categories 75.9, judge m" in output
    )
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["temperature"] == 0.2
    content = body["messages"][1]["content"]
    assert content.startswith(
        "[Context]\nObjects:\nObject 0 : cup 0\n\n[Question]\nWhat is the purpose of the object [0.100, 0.200"
    )
    assert "[Assistant 1]\nA cup 0\n\n[End of Assistant 1]" in content and content.endswith("[System]\nRate refer_desc.\n\n")
    judged = json.loads((bench / "run/ferret_bench/refer_desc/judged.json").read_text())
    assert judged["judge"] == {"model": "m", "url": server.url, "temperature": 0.2, "max_tokens": 1024}
    assert len(judged["rule_sha256"]) == 64 and judged["completeness"] == "PARTIAL: the file has 2 of 40 questions"
    assert score_folder(bench / "run/ferret_bench/refer_desc")["judged"]["value"] == pytest.approx(11.5 / 18)
    everything = "".join(p.read_text() for p in (bench / "run").rglob("*") if p.is_file())
    assert "secret" not in everything
    asked = len(server.requests)
    run(ferret_bench, *flags)
    assert len(server.requests) == asked, "asked once, kept for ever"


def test_another_judge_is_another_protocol(bench, server, tmp_path):
    folders = [shutil.copytree(bench / "run", tmp_path / name) for name in ("a", "b")]
    for folder, judge in zip(folders, ("m", "other"), strict=True):
        flags = ["--data", bench / "data", "--out", folder, "--score-only", "--judge-url", server.url, "--judge", judge]
        run(ferret_bench, *flags)
    with pytest.raises(DataError, match="protocol.judge is .*'m'.* in a and .*'other'.* in b"):
        refuse_different_protocol(load_runs([str(folder) for folder in folders]))


def test_a_busy_server_is_asked_again_and_a_refusal_is_one_sentence(server, tmp_path):
    judge = Judge(server.url, "busy", tmp_path, 0.2, 10)
    judge.waits = (0, 0)
    server.failures = 2
    assert judge.reply("x") == "8 4\nBecause." and len(server.requests) == 3
    server.failures = 3
    with pytest.raises(DataError, match="cannot be reached .503.*replies so far are kept"):
        judge.reply("y")
    server.failures = 1
    judge.model = "m"
    with pytest.raises(DataError, match="refuses the judge 'm' .401.*check --judge and the key"):
        judge.reply("y")
    judge.url, judge.waits = "http://127.0.0.1:9/v1", ()
    with pytest.raises(DataError, match="127.0.0.1:9/v1/chat/completions cannot be reached"):
        judge.reply("y")
    next(tmp_path.glob("*.json")).write_text("{")
    judge = Judge(server.url, "busy", tmp_path, 0.2, 10)
    with pytest.raises(DataError, match="not a kept reply"):
        judge.reply("x")


def test_the_key_stays_with_its_server_and_an_empty_reply_is_not_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = Judge(server.url.replace("/v1", "/moved"), "m", tmp_path, 0.2, 10)
    with pytest.raises(DataError, match="refuses the judge 'm' .404"):
        judge.reply("x")
    assert [(path, "Authorization" in headers) for path, headers, _ in server.requests] == [
        ("/moved/chat/completions", True), ("/v1/elsewhere", False)
    ]  # fmt: skip
    judge.url, server.replies = server.url, {"x": None}
    with pytest.raises(DataError, match="does not answer as chat completions do .*content is null"):
        judge.reply("x")
    assert not list(tmp_path.glob("*.json"))
    judge.url = "localhost:8000/v1"
    with pytest.raises(DataError, match="--judge-url localhost:8000/v1 is no address of a server"):
        judge.reply("x")


@pytest.mark.parametrize(
    ("reply", "marks"),
    [("<think>\n1 2\n</think>\n\n8 4", (8, 4)), ("<think>8 4", None),
     ("8 4", (8, 4)), ("8.5, 7\nwell", (8.5, 7)), ("\n9 10", (9, 10)), ("8", None), ("Assistant 1: 8", None), ("", None),
     ("0 5", None), ("8 11", None), ("nan 5", None), ("8 4 2", None)],
)  # fmt: skip
def test_the_first_line_holds_two_marks(reply, marks):
    assert marks_in(reply) == marks


def test_boxes_go_to_the_judge_in_the_pictures_own_frame():
    protocol = {"codec": "float3", "geometry": "pad"}  # the picture is the middle half of the square
    box = (0.0, 0.0, 1.0, 1.0)
    ground, describe = (Target("0", "a.png", 80, 40, "", box, "", kind) for kind in ("ground_conv", "refer_desc"))
    answer = "A cup [0.250, 0.375, 0.750, 0.625] on [0.300, 0.300, 0.100, 0.100]."
    assert for_the_judge(answer, ground, protocol) == "A cup [0.250, 0.250, 0.750, 0.750] on [0.300, 0.300, 0.100, 0.100]."
    assert for_the_judge(answer, describe, protocol) == "A cup on ."
    tokens = {"codec": "loc_tokens", "geometry": "squash"}
    read = for_the_judge("cup <loc_100><loc_200><loc_300><loc_400>", ground, tokens)
    assert json.loads(read.removeprefix("cup ")) == pytest.approx([0.1005, 0.2005, 0.3005, 0.4005], abs=6e-4)
    assert for_the_judge("a cup <loc_100><loc_200><loc_300><loc_400>", describe, tokens) == "a cup"
    words, boxes = regions_of("the [0.100, 0.5, 0.25, 1.002] or [0, 0, 1, 1]", 80, 40)
    assert words == "the <region:0> or <region:1>" and boxes == [(8.0, 20.0, 20.0, 40.0), (0.0, 0.0, 80.0, 40.0)]
    with pytest.raises(DataError, match="is no box of four numbers"):
        regions_of("the [red] one", 80, 40)


def write_judge(folder, reply):
    """A language model in which a token alone decides the next one: whatever is asked, it says `reply` and ends."""
    tokenizer = AutoTokenizer.from_pretrained(MLLM)
    start = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=True)
    chain = [start["input_ids"][-1], *tokenizer.encode(reply, add_special_tokens=False), tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain)
    size = len(tokenizer)
    sizes = {"hidden_size": size, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 5, "vocab_size": size}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    llm = LlamaForCausalLM(LlamaConfig(**sizes, head_dim=2, **ids))
    with torch.no_grad():
        for parameter in (*llm.model.layers.parameters(), llm.lm_head.weight):
            parameter.zero_()
        llm.model.embed_tokens.weight.copy_(torch.eye(size))
        for token, following in itertools.pairwise(chain):
            llm.lm_head.weight[following, token] = 1
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model_in_a_folder_judges_without_a_server(bench, tmp_path, capsys):
    folder, judge = shutil.copytree(bench / "run", tmp_path / "run"), write_judge(tmp_path / "judge", "9, 6")
    shutil.rmtree(folder / "ferret_bench/judge", ignore_errors=True)
    flags = ["--data", bench / "data", "--out", folder, "--score-only", "--temperature", 0]
    run(ferret_bench, *flags, "--judge", judge)
    output = capsys.readouterr().out
    assert "refer_reason   66.7 [66.7, 66.7]  n 2  without marks 0  (PARTIAL: the file has 2 of 40 questions)" in output
    judged = json.loads((folder / "ferret_bench/refer_desc/judged.json").read_text())
    assert judged["judge"]["model"] == "judge" and judged["judge"]["url"].startswith("weights ")
    kept = sorted((folder / "ferret_bench/judge").iterdir())
    assert len(kept) == 6 and all(json.loads(path.read_text())["reply"].strip() == "9, 6" for path in kept)
    run(ferret_bench, "--out", folder, "--score-only")  # without a judge: the marks there are
    assert capsys.readouterr().out.count("judged 66.7") == 3

    local = LocalJudge(judge, tmp_path / "kept", 0.7, 8)
    assert local._inputs([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])["input_ids"].shape[0] == 1
    local.tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    assert "S\\n\\nU" in local.tokenizer.decode(
        local._inputs([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])["input_ids"][0]
    )
    with pytest.raises(DataError, match="is no folder of a causal language model"):
        run(ferret_bench, *flags, "--judge", tmp_path)
    template = judge / "chat_template.jinja"
    template.unlink()
    with pytest.raises(DataError, match="has no chat template"):
        run(ferret_bench, *flags, "--judge", judge)


def test_what_is_missing_is_said_before_anything_is_asked(bench, tmp_path):
    flags = ["--model", MLLM, "--data", bench / "data", "--images", bench / "images", "--out", tmp_path]
    for given in (("--judge", "m"), ("--judge-url", "http://localhost/v1")):
        with pytest.raises(DataError, match="--judge and --judge-url are given together, .* or --judge alone with a folder"):
            run(ferret_bench, *flags, *given)
    with pytest.raises(DataError, match="--split refer is no category; choose among refer_desc"):
        run(ferret_bench, *flags, "--split", "refer")
    with pytest.raises(DataError, match="protocol.max_new_tokens 8, this run has 9"):
        run(ferret_bench, *flags[:-1], bench / "run", "--max-new-tokens", 9)
    with pytest.raises(DataError, match="has no refer_desc/question.jsonl"):
        run(ferret_bench, *flags[:2], "--data", tmp_path, *flags[4:])
