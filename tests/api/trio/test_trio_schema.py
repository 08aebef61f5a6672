"""The frame is cut out of a body without parsing it. The result must be the same as when all of the body is parsed."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.api.errors import InvalidRequest
from sidecar.api.trio import schema as trio_schema
from sidecar.api.trio.schema import CropDescribeRequest, DescribeRequest, DetectRequest, parse_request

FRAME = base64.b64encode(b"\xff\xd8\xff" + bytes(range(60))).decode()
#: Texts that look like the key, the end of the key, or the placeholder of the frame.
TRAPS = st.sampled_from(
    ["image_b64", '"image_b64": "AAAA"', '\\"image_b64":"AAAA"', "image stands elsewhere", 'x"', "\\", "é🚗", "", "A"]
)
IMAGES = st.one_of(
    st.just(FRAME), st.binary(max_size=40).map(lambda data: base64.b64encode(data).decode()), TRAPS,
    st.text("AB+/=\n ", max_size=12), st.none(), st.integers(), st.lists(TRAPS, max_size=2),
)  # fmt: skip
NESTED = st.recursive(
    st.one_of(TRAPS, st.just(FRAME), st.integers(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.one_of(TRAPS, st.just("image_b64")), inner, max_size=2)
    ),
    max_leaves=4,
)
PAIRS = st.lists(
    st.one_of(
        st.tuples(st.just("image_b64"), IMAGES),
        st.tuples(
            st.sampled_from(["prompt", "model", "scene_prompt", "other", "x image_b64", 'x"image_b64']),
            st.one_of(TRAPS, st.just(FRAME)),
        ),
        st.tuples(st.sampled_from(["extra_body", "response_format", "crops"]), NESTED),
        st.tuples(st.sampled_from(["max_tokens", "max_crops", "pad_ratio"]), st.integers(-1, 20)),
    ),
    max_size=6,
)


def outcome(kind, body: bytes):
    try:
        request, image = parse_request(kind, body, "application/json")
    except InvalidRequest as error:
        return error.status, error.message, error.detail
    return request.model_dump(exclude={"image_b64"}), bytes(image)


@settings(max_examples=400, deadline=None)
@given(PAIRS, st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r\n ")]), st.booleans())
def test_the_result_is_the_same_as_when_all_of_the_body_is_parsed(pairs, separators, ascii_only):
    comma, colon = separators
    texts = [json.dumps(name) + colon + json.dumps(value, ensure_ascii=ascii_only) for name, value in pairs]
    body = ("{" + comma.join(texts) + "}").encode()
    for kind in (DescribeRequest, CropDescribeRequest, DetectRequest):
        quick = outcome(kind, body)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trio_schema, "_find_image", lambda body: None)
            assert quick == outcome(kind, body)


def test_the_frame_is_a_view_of_the_body_and_not_a_copy():
    body = json.dumps({"prompt": "What?", "image_b64": FRAME}).encode()
    _, image = parse_request(DescribeRequest, body, "application/json")
    assert image.obj is body
    assert bytes(image).decode() == FRAME
