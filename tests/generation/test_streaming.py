"""Streaming: Transformers' streamers as they are, and ours; whoever stops reading stops the generation."""

from __future__ import annotations

import asyncio
import gc
import time
from threading import Event, Thread

import jax
import numpy as np
import pytest

from tests.generation.test_generate import EOS, models
from tests.reference import padded_mask, random_ids, th

LENGTH = {"max_new_tokens": 14, "eos_token_id": EOS, "pad_token_id": 3}


@pytest.fixture(scope="module")
def pair_of_models():
    return models(max_position_embeddings=2048, num_hidden_layers=1)


@pytest.fixture(scope="module")
def tokenizer(shared):
    """The real one: the tiny models' 331 tokens are single bytes and their first merges."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "data/tokenizer/qwen2.5-instruct")


def test_pieces_are_the_tokens_of_generate(rng, pair_of_models):
    _, mine = pair_of_models
    ids, mask = random_ids(rng, (3, 9)), padded_mask([9, 4, 7], 9, "left")
    want = mine.generate(ids, attention_mask=mask, **LENGTH)
    pieces = list(mine.stream(ids, attention_mask=mask, **LENGTH))
    assert all(piece.shape == (3,) for piece in pieces)
    np.testing.assert_array_equal(np.stack(pieces, axis=1), want[:, 9:])


@pytest.mark.parametrize("rows", [1, 3])
def test_text_is_what_the_tokenizer_decodes(rows, rng, pair_of_models, tokenizer):
    """In whole characters, which tokens of one byte seldom are, and without what fills finished rows."""
    _, mine = pair_of_models
    ids = random_ids(rng, (rows, 9))
    options = {"do_sample": True, "top_k": 0, "seed": 3, "eos_token_id": [7, 100], "pad_token_id": 65}
    options |= {"max_new_tokens": 30}
    new = mine.generate(ids, **options)[:, 9:]
    pieces = list(mine.stream(ids, tokenizer=tokenizer, **options))
    texts = ["".join(pieces)] if rows == 1 else ["".join(row) for row in zip(*pieces, strict=True)]
    for tokens, text in zip(new, texts, strict=True):
        ended = np.isin(tokens, [7, 100])
        tokens = tokens[: ended.argmax() + 1] if ended.any() else tokens
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
    if rows == 1:
        assert all(piece and not piece.endswith("\ufffd") for piece in pieces[:-1])


def test_async_reading(rng, pair_of_models):
    _, mine = pair_of_models
    ids = random_ids(rng, (2, 6))

    async def read(stop):
        pieces, ticks = [], 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        async with mine.stream(ids, **LENGTH) as stream:
            async for piece in stream:
                pieces.append(piece)
                if len(pieces) == stop:
                    break
        ticking.cancel()
        return pieces, ticks

    pieces, ticks = asyncio.run(read(None))
    np.testing.assert_array_equal(np.stack(pieces, axis=1), mine.generate(ids, **LENGTH)[:, 6:])
    assert ticks > len(pieces)  # the event loop went on
    assert len(asyncio.run(read(3))[0]) == 3


def test_a_reader_that_is_cancelled_in_mid_step(rng, pair_of_models):
    """The step ends in its thread, then the generation, and the error is the reader's own."""
    _, mine = pair_of_models
    ids = random_ids(rng, (2, 6))
    entered = Event()

    def slow(input_ids, scores, cur_len):
        entered.set()
        time.sleep(0.3)
        return np.asarray(scores)

    async def read(stream):
        async with stream:
            async for _ in stream:
                pass

    async def cancel():
        stream = mine.stream(ids, logits_processor=[slow], **LENGTH)
        entered.clear()
        reading = asyncio.create_task(read(stream))
        await asyncio.to_thread(entered.wait)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        return stream

    with pytest.warns(UserWarning, match="slow: called on the host"):
        stream = asyncio.run(cancel())
    assert next(stream, None) is None


def test_leaving_early_frees_the_memory(rng, pair_of_models):
    _, mine = pair_of_models
    ids = random_ids(rng, (2, 6))
    options = {"max_new_tokens": 40}
    mine.generate(ids, **options)

    def left_over(read):
        gc.collect()
        before = {id(array) for array in jax.live_arrays()}
        read()
        gc.collect()
        return [array.shape for array in jax.live_arrays() if id(array) not in before]

    def leave():
        idle = len(jax.live_arrays())
        stream = mine.stream(ids, **options)
        next(stream)
        assert len(jax.live_arrays()) > idle
        stream.close()
        assert next(stream, None) is None

    def drop():
        for _ in mine.stream(ids, **options):
            break

    def fail():
        with pytest.raises(RuntimeError, match="enough"), mine.stream(ids, **options):
            raise RuntimeError("enough")

    for read in (leave, drop, fail):
        assert left_over(read) == [], read.__name__


def test_a_streamer_that_raises_stops_the_generation(rng, pair_of_models):
    _, mine = pair_of_models

    class Full:
        puts = 0

        def put(self, value):
            self.puts += 1
            if self.puts == 3:
                raise RuntimeError("enough")

        def end(self):
            raise AssertionError("it has not ended")

    streamer = Full()
    with pytest.raises(RuntimeError, match="enough"):
        mine.generate(random_ids(rng, (2, 6)), streamer=streamer, max_new_tokens=40)
    assert streamer.puts == 3


def test_stream_checks_at_once(pair_of_models):
    _, mine = pair_of_models
    with pytest.raises(ValueError, match="temperature"):
        mine.stream([[1, 2]], temprature=0.3)
    for name in ("streamer", "custom_generate"):
        with pytest.raises(ValueError, match=rf"stream\(\) takes no {name}"):
            mine.stream([[1, 2]], **{name: print})


def test_text_streamer_prints_what_theirs_prints(rng, pair_of_models, tokenizer, capsys):
    from transformers import TextStreamer

    theirs, mine = pair_of_models
    ids = random_ids(rng, (1, 6))
    for skip in (False, True):
        printed = []
        for call, given in ((theirs.generate, th(ids)), (mine.generate, ids)):
            call(given, streamer=TextStreamer(tokenizer, skip_prompt=skip), do_sample=False, **LENGTH)
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1] != ""


def test_text_iterator_streamer_in_a_thread(rng, pair_of_models, tokenizer):
    from transformers import TextIteratorStreamer

    _, mine = pair_of_models
    ids = random_ids(rng, (1, 6))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=mine.generate, kwargs={"input_ids": ids, "streamer": streamer, **LENGTH})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(mine.generate(ids, **LENGTH)[0, 6:])


def test_async_text_iterator_streamer(rng, pair_of_models, tokenizer):
    from transformers import AsyncTextIteratorStreamer

    _, mine = pair_of_models
    ids = random_ids(rng, (1, 6))

    async def read():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = Thread(target=mine.generate, kwargs={"input_ids": ids, "streamer": streamer, **LENGTH})
        thread.start()
        text = "".join([piece async for piece in streamer])
        thread.join()
        return text

    assert asyncio.run(read()) == tokenizer.decode(mine.generate(ids, **LENGTH)[0, 6:])
