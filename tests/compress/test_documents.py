"""Conversations that a model is cut and healed on: prompts are read, responses are learned."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")

import torch
from tokenizers.processors import TemplateProcessing

from pipeline.compare.measures.language import bits_per_byte, divergence
from pipeline.compress import choice, folder
from pipeline.compress.calibration import LABELS, Calibration, token_loss
from pipeline.compress.compression import compress
from pipeline.compress.data import curated, pack_blocks, parquet, set_apart
from pipeline.compress.documents import (
    closing,
    conversations,
    read_ids,
    read_tensor,
    response_bytes,
    shortened,
    text_of,
    tokens_of,
)
from pipeline.compress.healing import heal, loss_sum
from pipeline.compress.recover.base import Setup
from pipeline.compress.recover.distill import Distill
from pipeline.compress.recover.full import Full
from pipeline.compress.recover.perp import Perp
from pipeline.compress.steps.vocab import rewrite
from pipeline.corpus.content import Content
from pipeline.errors import ConfigError, CorpusError, TamisError
from tests.compress.test_compression import configured
from tests.tiny_chat import END, START, TEMPLATE, answering, rendered
from tests.tiny_lm import BIRDS, sentences
from tests.tiny_run import make_chat_run


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def loaded(tuned: Path) -> tuple[Any, Any]:
    return folder.load(tuned)


def test_what_is_read_is_the_whole_and_what_is_learned_the_response(loaded) -> None:
    _, tokenizer = loaded
    (ids,) = tokens_of(rendered(("wren owl", "oak pine")), tokenizer)
    assert tokenizer.decode(read_ids(ids)) == "wren owl\n\noak pine"
    assert tokenizer.decode(ids[ids >= 0]).strip() == "oak pine"
    np.testing.assert_array_equal(read_tensor(torch.from_numpy(ids)).numpy(), read_ids(ids))
    assert tokenizer.backend_tokenizer.truncation is None  # a tokenizer is saved with what is set


def test_of_a_template_the_end_is_learned_and_nothing_that_a_row_says_is_special(loaded, tuned: Path) -> None:
    _, tokenizer = loaded
    end = tokenizer.convert_tokens_to_ids(END)
    (ids,) = tokens_of(rendered(("wren", f"oak{END}"), template=tuned), tokenizer)
    assert (read_ids(ids) == end).sum() == 2  # of the template alone
    learned = ids[ids >= 0]
    assert learned[-1] == end
    assert tokenizer.decode(learned[:-1]) == f"oak{END}"


def test_what_a_tokenizer_puts_around_a_text_is_left_out(loaded) -> None:
    _, tokenizer = deepcopy(loaded)
    plain = tokens_of(rendered(("wren", "oak")), tokenizer)[0]
    around = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = around
    np.testing.assert_array_equal(tokens_of(rendered(("wren", "oak")), tokenizer)[0], plain)


def test_a_document_is_closed_where_nothing_else_has_ended_it(loaded, tuned: Path) -> None:
    _, tokenizer = loaded
    eos = tokenizer.eos_token_id
    assert closing(pa.array(["a"], pa.large_string()), tokenizer) == eos
    assert closing(rendered(("a", "b")), tokenizer) == eos  # or it would not learn to stop
    assert closing(rendered(("a", "b"), template=tuned), tokenizer) == ~eos
    block = pack_blocks(rendered(("wren", "oak"), template=tuned), tokenizer, 200, 200)[0]
    assert read_ids(block).tolist().count(eos) > 0
    assert eos not in block


def test_documents_are_set_apart_and_shortened_whole() -> None:
    many = rendered(*[(f"wren {i}", f"oak {i}") for i in range(200)])
    apart, rest = set_apart(iter([many]), 0.2, 0)
    assert conversations(apart)
    assert sorted(text_of(apart).to_pylist() + text_of(rest).to_pylist()) == sorted(text_of(many).to_pylist())
    assert len(apart) > 10
    assert response_bytes(many[:2]).tolist() == [5, 5]
    long = rendered(("wren", "öäü" * 9), ("wren " * 50, "oak"))
    cut = shortened(long, 10)
    assert text_of(cut).to_pylist() == ["wren\n\nöäüö"]  # of the second nothing is left to learn
    assert response_bytes(cut).tolist() == [8]


def labelled(ids: np.ndarray) -> dict[str, Any]:
    read = torch.from_numpy(read_ids(ids)).long()
    return {"input_ids": read, "labels": torch.where(torch.from_numpy(ids) >= 0, read, -100)}


@pytest.fixture(scope="module")
def blocks(loaded, tuned: Path) -> np.ndarray:
    pairs = list(zip(sentences(60, seed=3, words=BIRDS), sentences(60, seed=4), strict=True))
    found = pack_blocks(rendered(*pairs, template=tuned), loaded[1], 32, 32 * 24)
    return found[(found[:, 1:] >= 0).any(1)]  # transformers has no loss of a block that is all prompt


def test_losses_are_those_of_transformers_on_the_responses(loaded, blocks: np.ndarray) -> None:
    model, _ = loaded
    total, count = loss_sum(model, blocks)
    with torch.no_grad():
        rows = [model(**labelled(block[None])).loss for block in blocks]
    assert 0.2 < count / blocks.size < 0.8
    weights = (blocks[:, 1:] >= 0).sum(1)
    assert total / count == pytest.approx(float((torch.stack(rows) * torch.from_numpy(weights)).sum()) / count)
    (batch,) = Calibration.of_blocks(model, blocks, len(blocks)).batches
    with torch.no_grad():
        torch.testing.assert_close(token_loss(model, batch), torch.stack(rows))


def test_gradients_of_calibration_are_of_the_responses(loaded, blocks: np.ndarray) -> None:
    model, _ = loaded
    found = Calibration.of_blocks(model, blocks, 8).gradients()
    losses = [model(**labelled(block[None])).loss for block in blocks]
    wanted = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
    for name, gradient in zip(dict(model.named_parameters()), wanted, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_rewritten_batches_say_what_is_learned() -> None:
    pieces = [np.array([0]), np.array([1, 2]), np.array([3])]
    batch = {"input_ids": torch.tensor([[1, 2, 1, 0]]), LABELS: torch.tensor([[-100, 2, 1, 0]])}
    new = rewrite(batch, pieces)
    assert new["input_ids"].tolist() == [[1, 2, 3, 1]]
    assert new[LABELS].tolist() == [[-100, -100, 3, 1]]


def test_what_compares_with_the_parent_reads_the_whole(loaded, blocks: np.ndarray) -> None:
    """Prompts reach both models, whatever a method measures; where tokens were renamed, the parent by its own names."""
    model, _ = loaded
    other, whole = make_noise(model), read_ids(blocks)
    assert choice.divergence(model, other, blocks) == choice.divergence(model, other, whole)

    known, same = (Setup(deepcopy(other), blocks, model, vocabulary=v) for v in (np.arange(300), None))
    ids, read = torch.from_numpy(blocks).long(), torch.from_numpy(whole).long()
    assert float(Distill().begin(known).loss(ids).detach()) == float(Distill().begin(same).loss(ids).detach())

    masks = {"model.layers.0.mlp.down_proj.weight": torch.ones(32, 64, dtype=torch.bool)}
    session = Perp(reconstruct=True, rank=2).begin(Setup(deepcopy(other), blocks, model, masks=masks))
    part, every = (float(session.loss(i).detach()) / int((i[:, 1:] >= 0).sum()) for i in (ids, read))
    assert part == pytest.approx(every, rel=1e-6)


def test_a_token_that_the_student_lacks_is_refused_wherever_it_stands(loaded, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token id 300, where the student knows 300"):
        heal(loaded[0], Full(), np.full((4, 8), ~300), 32, directory=tmp_path)


def test_healing_learns_responses_and_not_prompts(loaded, tuned: Path, tmp_path: Path) -> None:
    """The same answer to whatever is asked: it comes to be known, the prompts do not."""
    model, tokenizer = folder.load(tuned)
    rng = np.random.default_rng(0)
    asked = [" ".join(rng.choice(["kea", "zzz", "qqq", "vvv"], 6)) for _ in range(200)]
    rows = pack_blocks(rendered(*[(p, "oak pine elm") for p in asked], template=tuned), tokenizer, 32, 6400)
    whole = read_ids(rows)

    def losses() -> tuple[float, float]:
        everything, said = loss_sum(model, whole)[0], loss_sum(model, rows)[0]
        prompts = everything - said
        return said / int((rows[:, 1:] >= 0).sum()), prompts / int((rows[:, 1:] < 0).sum())

    before = losses()
    heal(model, Full(lr=3e-3, batch=8), rows, 25_600, directory=tmp_path)
    after = losses()
    assert after[0] < 0.1 * before[0]
    assert after[1] > 0.8 * before[1]


def test_bits_and_divergence_are_of_the_responses(loaded, tuned: Path) -> None:
    model, tokenizer = loaded
    asked = rendered(("wren owl", "oak pine"), ("owl", "fir"), template=tuned)
    found = bits_per_byte(model, tokenizer, asked, "x")[0]
    other = make_noise(model)
    told = divergence(model, other, tokenizer, asked)
    for i, ids in enumerate(tokens_of(asked, tokenizer)):
        whole = torch.tensor([[tokenizer.eos_token_id, *read_ids(ids)]])
        with torch.no_grad():
            ours, theirs = (m(whole).logits[0, :-1].log_softmax(-1) for m in (model, other))
        counts = torch.from_numpy(ids >= 0)
        bits = -ours.gather(1, whole[0, 1:, None])[:, 0][counts].sum() / np.log(2)
        said = len(("oak pine", "fir")[i] + END)
        assert found.values[i] == pytest.approx(float(bits) / said, rel=1e-4)
        each = (ours.exp() * (ours - theirs)).sum(-1)
        assert told.values[i] == pytest.approx(float(each[counts].mean()), rel=1e-3)
    with pytest.raises(TamisError, match="a response is empty"):
        bits_per_byte(model, tokenizer, asked[:0], "x")


def make_noise(model: Any) -> Any:
    other = deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


# ---- as its user runs it


@pytest.fixture(scope="module")
def chat_run(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_chat_run(tmp_path_factory.mktemp("chat_run"), str(tuned))


@pytest.mark.parametrize("by", ["random", "length"])
def test_a_model_is_cut_and_healed_on_conversations(chat_run: str, tuned: Path, tmp_path: Path, by: str) -> None:
    result = compress(configured(chat_run, tmp_path, model=str(tuned), calibration={"rows": 8, "by": by}), quiet=True)
    assert result.healed is not None
    assert result.dense < result.cut
    assert result.healed < result.cut
    metrics = [json.loads(line) for line in (tmp_path / "recover" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["held_out"] for line in metrics if "held_out" in line]
    assert held_out[-1] < held_out[0]
    _, tokenizer = folder.load(Path(result.folder))
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.chat_template == TEMPLATE
    assert "unseen responses" in (Path(result.folder) / "README.md").read_text()


def test_tokens_are_trimmed_by_what_conversations_use(chat_run: str, tuned: Path, tmp_path: Path) -> None:
    steps = [{"kind": "vocab", "coverage": 0.9, "tokenizer": str(tuned)}]
    result = compress(configured(chat_run, tmp_path, model=str(tuned), steps=steps), quiet=True)
    _, tokenizer = folder.load(Path(result.folder))
    assert len(tokenizer) < 300
    assert {START, END} <= set(tokenizer.get_vocab())
    assert result.healed is not None
    assert result.healed < result.cut


def instructed(place: Path, rows: int) -> Path:
    """Conversations in a file that no run has seen, the last two of no use."""
    asked, said = sentences(rows, seed=1, words=BIRDS), sentences(rows)
    pq.write_table(pa.table({"asked": [*asked, "wren", None], "said": [*said, " ", "oak"]}), place / "chats.parquet")
    return place / "chats.parquet"


def test_conversations_in_files_are_healed_on_as_those_of_a_run(tuned: Path, tmp_path: Path) -> None:
    file = instructed(tmp_path, 200)
    written = {"prompt": "asked", "response": "said", "template": str(tuned)}
    steps = [{"method": "llm_pruner", "ratio": 0.4}, {"kind": "vocab", "coverage": 0.5, "tokenizer": str(tuned)}]
    asked = configured(str(file), tmp_path / "made", model=str(tuned), steps=steps, **written)
    result = compress(asked, quiet=True)
    assert result.healed is not None
    assert result.healed < result.cut
    assert result.unusable == {"empty response": 1, "no prompt": 1}
    noted = json.loads(Path(result.report).read_text())
    assert noted["unusable_rows"] == {"empty response": 1, "no prompt": 1}
    assert "unseen responses" in (Path(result.folder) / "README.md").read_text()
    _, tokenizer = folder.load(Path(result.folder))
    assert len(tokenizer) < 300  # counted in the conversations as well
    assert {START, END} <= set(tokenizer.get_vocab())


def test_messages_in_files_say_what_their_columns_say(tuned: Path, tmp_path: Path) -> None:
    pairs = [("wren owl", "oak pine"), ("owl", "pine")]
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in pairs]
    pq.write_table(pa.table({"messages": [json.dumps(t) for t in turns]}), tmp_path / "json.parquet")
    pq.write_table(pa.table({"messages": turns}), tmp_path / "struct.parquet")
    wanted = rendered(*pairs, template=tuned).to_pylist()
    for name in ("json", "struct"):
        source = parquet([str(tmp_path / f"{name}.parquet")], Content(messages="messages", template=str(tuned)))
        assert [row for documents in source.documents() for row in documents.to_pylist()] == wanted


@pytest.mark.parametrize(
    ("written", "error", "words"),
    [
        (
            {"prompt": "asked", "response": "answer"},
            ConfigError,
            r"^data.response: there is no column 'answer', only asked, said",
        ),
        ({"messages": "said"}, CorpusError, r"none of its 12 rows is usable; 11 of them: messages are not JSON"),
        ({"text": None}, ConfigError, r"name the column of `text` or of `messages`"),
        ({"prompt": "asked"}, ConfigError, r"`prompt` and `response` go together"),
        ({"prompt": "asked", "response": "said", "text": "said"}, ConfigError, r"remove `text`"),
        ({"template": "."}, ConfigError, r"`template` writes conversations"),
    ],
)
def test_files_that_are_not_what_was_said(
    written: dict[str, Any], error: type[TamisError], words: str, tuned: Path, tmp_path: Path
) -> None:
    file = instructed(tmp_path, 10)
    with pytest.raises(error, match=words):
        compress(configured(str(file), tmp_path / "made", model=str(tuned), **written), quiet=True)


def test_columns_are_looked_for_before_a_model_is_trained(tmp_path: Path) -> None:
    asked = configured(str(instructed(tmp_path, 10)), tmp_path / "made", messages="turns")
    assert not isinstance(asked.model, str)
    with pytest.raises(ConfigError, match=r"^data.messages: there is no column 'turns', only asked, said"):
        compress(asked, quiet=True)
    assert not (tmp_path / "made" / "parent").exists()


def test_a_tokenizer_without_a_template_writes_none(tuned: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tuned, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"^data.template: .* gives no chat template"):
        parquet([str(instructed(tmp_path, 10))], Content(prompt="asked", response="said", template=str(bare)))


def test_a_run_is_not_told_what_its_rows_are(chat_run: str, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"knows what its rows are: remove the columns"):
        compress(configured(chat_run, tmp_path, model=str(tuned), messages="messages"), quiet=True)


def test_the_template_is_part_of_what_identifies_the_data(chat_run: str, tmp_path: Path) -> None:
    plain = make_chat_run(tmp_path)
    here = curated(chat_run)
    assert here.chat is not None
    assert here.of(["a"], "x").fingerprint != replace(here, chat=replace(here.chat, ends=())).of(["a"], "x").fingerprint
    first = next(curated(plain).documents())
    assert [f.name for f in first.type] == ["text", "targets"]
    assert [f.name for f in next(curated(chat_run).documents()).type] == ["text", "targets", "markup"]


def test_images_are_nothing_to_heal_on(tmp_path: Path) -> None:
    (tmp_path / "handoff.json").write_text(json.dumps({"text_column": None, "image_column": "image"}))
    with pytest.raises(ConfigError, match="are images, and a model is cut and healed on texts or conversations"):
        curated_of(tmp_path)


def curated_of(run: Path) -> Any:
    (run / "manifest.json").write_text(json.dumps({"curated": {"path": str(run)}}))
    return curated(str(run))
