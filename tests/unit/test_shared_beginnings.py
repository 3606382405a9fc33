"""Where in a prompt a state is of use to others."""

import numpy as np
import pytest

from lola_vllm.serving.sessions.shared import Beginnings
from lola_vllm.sessions.chain import SPAN, Chain, namespace


def text(seed, n):
    return np.random.default_rng(seed).integers(0, 1000, n).tolist()


def chain(tokens, salt="", adapter=""):
    return Chain(namespace("", adapter, salt), tokens)


def places(point):
    return None if point is None else (point.num_tokens, point.new)


SHARED = text(0, 600)


def test_the_second_prompt_is_parted_and_later_ones_start_there():
    known = Beginnings()
    assert known.meet(chain([*SHARED, 1000, *text(1, 300)])) is None
    assert places(known.meet(chain([*SHARED, 1001, *text(2, 50)]))) == (600, True)
    point = known.meet(chain([*SHARED, 1002, *text(3, 500)]))
    assert places(point) == (600, False) and point.key == chain(SHARED).key(600)


def test_a_chat_goes_on_from_the_ends_of_its_prompts():
    known, said, before = Beginnings(), [], None
    for turn in range(5):
        said = said + text(turn, 400)
        assert places(known.meet(chain(said))) == before
        before = len(said), False
        said = said + text(50 + turn, 30)  # the answer


def test_places_that_save_less_than_a_span_are_left():
    known = Beginnings()
    known.meet(chain([*SHARED[: SPAN - 1], 1000]))
    assert known.meet(chain([*SHARED[: SPAN - 1], 1001])) is None
    known = Beginnings()
    known.meet(chain([*SHARED[:SPAN], 1000]))
    assert places(known.meet(chain([*SHARED[:SPAN], 1001]))) == (SPAN, True)
    # A little more in common than what is stored.
    known.meet(chain([*SHARED[: SPAN + 40], 1002]))
    assert places(known.meet(chain([*SHARED[: SPAN + 40], 1003]))) == (SPAN, False)


def test_the_same_prompt_again_leaves_a_token_to_compute():
    known = Beginnings()
    known.meet(chain(SHARED))
    assert places(known.meet(chain(SHARED))) == (599, True)
    assert places(known.meet(chain(SHARED))) == (599, False)


@pytest.mark.parametrize("other", [{"salt": "b"}, {"adapter": "b"}])
def test_salts_and_adapters_share_nothing(other):
    known = Beginnings()
    known.meet(chain([*SHARED, 1000]))
    assert known.meet(chain([*SHARED, 1001], **other)) is None
    assert places(known.meet(chain([*SHARED, 1001]))) == (600, True)


def test_a_state_that_is_gone_is_stored_again():
    known = Beginnings()
    known.meet(chain([*SHARED, 1000]))
    known.meet(chain([*SHARED, 1001]))
    again = chain([*SHARED, 1002])
    assert places(known.meet(again)) == (600, False)
    known.forget(again, above=0, upto=600)
    assert places(known.meet(chain([*SHARED, 1003]))) == (600, True)


def test_old_prompts_are_forgotten_and_leave_nothing():
    known = Beginnings(max_tokens=2000)
    known.meet(chain([*SHARED, 1000]))
    for seed in range(10, 30):
        known.meet(chain(text(seed, 500 + 10 * seed)))
    assert known.meet(chain([*SHARED, 1001])) is None
    assert known._tokens <= 2000
    assert known._tokens == sum(len(text) for text in known._texts.values())
    known.max_tokens = 0
    known.meet(chain(SHARED))
    assert not (known._texts or known._through or known._points._tails or known._points._states)
