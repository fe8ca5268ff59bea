"""Where image tokens lie on pictures: counts against processors and models, boxes against what the models see."""

from __future__ import annotations

import copy
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import _zoo
import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

import steer_plugin as sp
from steer_plugin import _tiles
from steer_plugin.analysis.pictures import plot_positions
from steer_plugin.pictures import Section, TokenBox, picture_tokens, sections, token_boxes

FAMILIES = tuple(_zoo.FAMILIES)
GRIDS = tuple(name for name in FAMILIES if name != "mllama")  # its one token carries no pixels
VISION = ("model.vision_tower", "model.visual", "model.vision_model")
FIRST_LAYERS = ("model.language_model.layers.0", "model.text_model.layers.0")
BLOCKS = 6  # a picture is changed in BLOCKS x BLOCKS places, one after another
SIZE = st.tuples(st.integers(8, 96), st.integers(8, 96))
ROWS = st.lists(st.lists(SIZE, max_size=3), min_size=1, max_size=3)


def encode(name: str, pictures: list[list[Image.Image]], **more: Any) -> dict[str, Any]:
    processor = _zoo.processor_of(name)
    texts = [_zoo.chat(processor, "w1 w2" + " w3" * (i % 3), len(row)) for i, row in enumerate(pictures)]
    if texts[0].startswith(processor.tokenizer.bos_token):
        more["add_special_tokens"] = False
    more |= {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    made = processor(images=pictures if any(pictures) else None, text=texts, **more)
    return {key: value for key, value in made.items() if key != "labels"}


def pictures_of(rows: list[list[tuple[int, int]]]) -> list[list[Image.Image]]:
    return [[_zoo.picture(*size, seed=i) for i, size in enumerate(row)] for row in rows]


@cache
def model_of(name: str) -> Any:
    return _zoo.tiny(name)


def image_columns(name: str, inputs: dict[str, Any]) -> torch.Tensor:
    return inputs["input_ids"] == model_of(name).config.image_token_id


def located(name: str, *sizes: tuple[int, int], **more: Any) -> list[Any]:
    """Sections of the pictures of a single prompt."""
    pictures = pictures_of([list(sizes)])
    return sections(model_of(name).config, encode(name, pictures, **more), _zoo.processor_of(name), pictures)[0]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15)
@given(rows=ROWS)
def test_counts_are_the_processors(name: str, rows: list[list[tuple[int, int]]]):
    if "paligemma" in name and not any(rows):
        return  # its processor takes no prompt without a picture
    config, pictures = model_of(name).config, pictures_of(rows)
    inputs = encode(name, pictures)
    columns = image_columns(name, inputs)
    assert picture_tokens(config, inputs) == int(columns.sum())
    found = sections(config, inputs, _zoo.processor_of(name), pictures)
    assert [len(row) for row in found] == [len(row) for row in rows]
    assert [len(token_boxes(row)) for row in found] == columns.sum(-1).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_the_models(name: str):
    """The forward takes as many image tokens as are counted; one less is told before it runs."""
    inputs = encode(name, pictures_of([[(90, 30)], [(8, 50), (33, 17)], [(16, 16)]]))
    model = model_of(name)
    with torch.no_grad():
        model(**inputs)
    short = dict(inputs, input_ids=inputs["input_ids"].clone())
    row, column = image_columns(name, inputs).nonzero()[0]
    short["input_ids"][row, column] = 4
    assert picture_tokens(model.config, short) == int(image_columns(name, short).sum()) + 1
    with pytest.raises(sp.InputError, match="the pictures ask for"):
        sections(model.config, short, _zoo.processor_of(name))


def local(name: str) -> Any:
    """A model without paths between patches, so that a feature depends on its own pixels only."""
    model = _zoo.tiny(name)
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.startswith(VISION) and path.endswith(("out_proj", "o_proj", "attn.proj", "projection_layer")):
                for parameter in module.parameters():
                    parameter.zero_()
    return model


def variants(width: int, height: int) -> list[Image.Image]:
    """A picture, and copies of it that are inverted in one block each, row by row."""
    pixels = np.asarray(_zoo.picture(width, height))
    down, across = np.arange(height) * BLOCKS // height, np.arange(width) * BLOCKS // width
    blocks = down[:, None] * BLOCKS + across[None]
    return [Image.fromarray(np.where((blocks == n)[..., None], 255 - pixels, pixels)) for n in range(-1, BLOCKS**2)]


def influence(name: str, size: tuple[int, int], **more: Any) -> tuple[torch.Tensor, list[TokenBox]]:
    """(block, token) how far the stream at a token of the picture moves with a block, at most 1; and the boxes."""
    pictures, model, seen = [[one] for one in variants(*size)], local(name), list[torch.Tensor]()
    inputs = encode(name, pictures, **more)
    layer = next(module for path, module in model.named_modules() if path in FIRST_LAYERS)
    layer.register_forward_pre_hook(
        lambda module, args, named: seen.append((args or (named["hidden_states"],))[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    stream = torch.stack([row[mask] for row, mask in zip(seen[0], image_columns(name, inputs), strict=True)])
    moved = (stream[1:] - stream[:1]).norm(dim=-1)
    found = sections(model.config, inputs, _zoo.processor_of(name), pictures)
    return moved / moved.amax(0).clamp(min=1e-6), token_boxes(found[0])


def overlap(box: tuple[float, float, float, float], block: int) -> float:
    """By how much a block reaches into a box, in fractions of the picture; negative: how far it is away."""
    top, left = (place / BLOCKS for place in divmod(block, BLOCKS))
    across = min(box[2], left + 1 / BLOCKS) - max(box[0], left)
    return min(across, min(box[3], top + 1 / BLOCKS) - max(box[1], top))


def follows(name: str, size: tuple[int, int], **more: Any) -> None:
    moved, boxes = influence(name, size, **more)
    assert moved.shape[1] == len(boxes)
    for token, (picture, box) in enumerate(boxes):
        assert picture == 0
        if box is None:  # a newline is a parameter
            assert not moved[:, token].any()
            continue
        for block in range(BLOCKS**2):
            # Resizing mixes neighbouring pixels: much moves in the box or at its edge only, a little everywhere in it.
            assert moved[block, token] < 0.1 or overlap(box, block) > -0.05, (token, box, block)
            assert moved[block, token] > 0.02 or overlap(box, block) < 0.02, (token, box, block)


@pytest.mark.parametrize("size", [(96, 60), (36, 96)])
@pytest.mark.parametrize("name", GRIDS)
def test_boxes_are_what_the_tokens_see(name: str, size: tuple[int, int]):
    follows(name, size)


def test_boxes_of_gemmas_crops():
    follows("gemma3", (640, 300), do_pan_and_scan=True)


def test_the_processors_own_settings_count():
    """What a processor hands down overrides its image processor."""
    processor = copy.copy(_zoo.processor_of("gemma3"))
    processor.images_kwargs = {**processor.images_kwargs, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
    pictures = pictures_of([[(60, 20)]])
    inputs = processor(images=pictures, text=[_zoo.chat(processor, "w1")], return_tensors="pt")
    ((found,),) = sections(model_of("gemma3").config, inputs, processor, pictures)
    assert found == (Section(2, 2), *(Section(2, 2, box, view="tiles") for box in _tiles.tile_boxes(1, 3)))
    # Without the pictures, nothing tells a crop from a picture.
    assert sections(model_of("gemma3").config, inputs, processor) == [[(Section(2, 2),)] * 4]


def test_boxes_of_several_pictures():
    """OneVision pads a picture that is not alone to a square; the others' tiles follow one another."""
    base, wide = located("llava_onevision", (40, 20), (16, 32))
    assert base == (Section(2, 2, (0.0, -0.5, 1.0, 1.5), "end"),)
    assert wide == (Section(2, 2, (-0.5, 0.0, 1.5, 1.0), "end"),)
    first, second = located("idefics3", (32, 16), (16, 16))
    assert [one.view for one in first] == ["tiles", "tiles", "whole"]
    assert [token.picture for token in token_boxes([first, second])] == [0] * 12 + [1] * (4 * len(second))


def test_boxes_by_hand():
    half = 0.5
    # The shorter edge becomes 16 pixels, the middle 16 of the longer one are seen.
    assert located("llava", (64, 32)) == [(Section(2, 2, (0.25, 0.0, 0.75, 1.0)),)]
    assert token_boxes(located("llava", (64, 32)))[1] == (0, (half, 0.0, 0.75, half))
    # 32 x 16 fits the shape 32 x 16: the whole picture, then two tiles of 2 x 2 side by side, each row with a newline.
    (picture,) = located("llava_next", (32, 16))
    assert picture == (Section(2, 2), Section(2, 4, newline="row", view="tiles"))
    boxes = [box for _, box in token_boxes([picture])]
    assert boxes[4:9] == [(i / 4, 0.0, (i + 1) / 4, half) for i in range(4)] + [None]
    assert boxes[9] == (0.0, half, 0.25, 1.0)
    # 32 x 20 goes into 32 x 32 with 6 pixels of padding above and below; the outer two rows of 8 pixels are cut off.
    (_, tiles), *_ = located("llava_next", (32, 20))
    assert (tiles.rows, tiles.cols) == (2, 4)
    assert tiles.box == pytest.approx((0.0, 0.1, 1.0, 0.9))
    # 32 x 16 pixels are 4 x 2 tokens of 8 pixels; the second token is right of the first, the fifth below it.
    boxes = [box for _, box in token_boxes(located("qwen2_vl", (32, 16)))]
    assert boxes[:2] == [(0.0, 0.0, 0.25, half), (0.25, 0.0, half, half)]
    assert boxes[4] == (0.0, half, 0.25, 1.0)
    # Two tiles of 2 x 2 tokens, one on top of the other, then the whole picture.
    for name in ("idefics3", "smolvlm", "internvl"):
        upper, lower, whole = located(name, (16, 32))[0]
        assert (upper, lower) == tuple(Section(2, 2, (0.0, y, 1.0, y + half), view="tiles") for y in (0.0, half))
        assert whole == Section(2, 2)
    assert located("mistral3", (20, 9)) == [(Section(2, 3),)]  # resized to whole tokens of 8 pixels, not cropped
    assert located("mllama", (20, 90)) == [(Section(1, 1),)]
    assert located("paligemma", (20, 90)) == located("gemma3", (20, 90)) == [(Section(2, 2),)]


def test_llava_without_its_pictures_knows_what_the_model_sees():
    inputs = encode("llava", pictures_of([[(64, 32)]]))
    assert sections(model_of("llava").config, inputs) == [[(Section(2, 2),)]]


def test_llava_padded_to_a_square():
    """The processor of LLaVA's authors pads before it resizes."""
    assert _tiles.squared(64, 32) == (0.0, -0.5, 1.0, 1.5)
    processor = hf.LlavaProcessor(
        image_processor=hf.LlavaImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_pad=True
        ),
        tokenizer=_zoo.processor_of("llava").tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    pictures = pictures_of([[(64, 32)]])
    inputs = processor(images=pictures, text="<image> w1", return_tensors="pt")
    assert sections(model_of("llava").config, inputs, processor, pictures) == [
        [(Section(2, 2, (0.0, -0.5, 1.0, 1.5)),)]
    ]


def test_llava_with_its_class_token():
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(image_size=16, patch_size=8), text_config=hf.LlamaConfig(),
        image_token_index=7, vision_feature_select_strategy="full",
    )  # fmt: skip
    inputs = {"pixel_values": torch.zeros(1, 3, 16, 16), "input_ids": torch.tensor([[1, 7, 7, 7, 7, 7, 2]])}
    assert picture_tokens(config, inputs) == 5
    assert sections(config, inputs) == [[(Section(1, 1, view="class"), Section(2, 2))]]


def arithmetic(kind: type[Any], config: Any, **more: Any) -> Any:
    """A processor without its tokenizer."""
    bare = object.__new__(kind)
    bare.__dict__.update(more, image_processor=SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints))
    return bare


@cache
def released() -> Any:
    """(config, processor, picture size, tokens that the model drops) as released."""
    plain = hf.LlavaNextConfig(vision_config=hf.CLIPVisionConfig(image_size=336, patch_size=14))
    one = hf.LlavaOnevisionConfig(vision_config=hf.SiglipVisionConfig(image_size=384, patch_size=14))
    most = {"num_image_tokens": 729, "vision_aspect_ratio": "anyres_max_9"}
    return (
        (plain, arithmetic(hf.LlavaNextProcessor, plain, patch_size=14, num_additional_image_tokens=1), 336, 1),
        (one, arithmetic(hf.LlavaOnevisionProcessor, one, **most), 384, 0),
    )


@settings(max_examples=200)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_released_sizes(width: int, height: int):
    """At the sizes of the released checkpoints: the processors' own arithmetic."""
    inputs = {"pixel_values": torch.zeros(1), "image_sizes": torch.tensor([[height, width]])}
    for config, processor, size, dropped in released():
        assert picture_tokens(config, inputs) == processor._get_number_of_features(height, width, size, size) - dropped
    cols, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
    assert _tiles.canvas(width, height, (448, 448), 1, 12) == (rows, cols)
    crops = Gemma3ImageProcessorPil.pan_and_scan(None, np.broadcast_to(0, (3, height, width)), 256, 4, 1.2)
    found = _tiles.pan_and_scan(width, height, 256, 4, 1.2)
    assert [(round((b[3] - b[1]) * height), round((b[2] - b[0]) * width)) for b in found] == [
        c.shape[1:] for c in crops
    ]


def test_a_shrunk_grid_keeps_its_box():
    """OneVision's anyres_max_9: 36 tiles of 27 x 27 features are shrunk to as many as 9 tiles have."""
    square = [[2304, 2304]]
    assert _tiles.unpadded_grid(2304, 2304, square, 384, 27) == (162, 162, _tiles.WHOLE)
    assert _tiles.unpadded_grid(2304, 2304, square, 384, 27, most=9) == (81, 81, _tiles.WHOLE)


def test_what_cannot_be_known():
    model = model_of("llava_next")
    inputs = encode("llava_next", pictures_of([[(20, 30)]]))
    assert picture_tokens(model.config, {"input_ids": inputs["input_ids"]}) == 0
    assert picture_tokens(model.config, {key: inputs[key] for key in ("input_ids", "pixel_values")}) is None
    assert picture_tokens(model.config, {"mm_encoder_outputs": {"image": object()}}) is None
    own = hf.Blip2Config()
    assert picture_tokens(own, inputs) is None
    with pytest.raises(sp.FamilyError, match=r"'blip-2'; it is for gemma3, idefics3"):
        sections(own, inputs)
    tower = hf.LlavaConfig(vision_config=hf.Dinov2Config())
    assert picture_tokens(tower, inputs) is None


def test_refusals():
    pictures = pictures_of([[(32, 16)]])

    def find(name: str, **more: Any) -> Any:
        return sections(model_of(name).config, encode(name, pictures), **more)

    with pytest.raises(sp.InputError, match=r"Idefics3 and SmolVLM.*pass processor="):
        find("idefics3")
    with pytest.raises(sp.InputError, match=r"picture 0 of row 0 has 2 tiles.*pass pictures= and processor="):
        find("internvl", processor=_zoo.processor_of("internvl"))
    with pytest.raises(sp.InputError, match="2 tiles, but this processor cuts one of its size into 1 x 3"):
        find("internvl", processor=_zoo.processor_of("internvl"), pictures=pictures_of([[(48, 16)]]))
    with pytest.raises(sp.InputError, match=r"cut is the processor's rule; pass processor="):
        find("llava", pictures=pictures)
    with pytest.raises(sp.InputError, match="row 0 has image tokens for 1 pictures, but 2 were given"):
        find("qwen2_vl", pictures=[pictures[0] * 2])
    with pytest.raises(sp.InputError, match="lists of pictures for 2 rows, but input_ids have 1"):
        find("qwen2_vl", pictures=pictures * 2)
    config = model_of("qwen2_vl").config
    with pytest.raises(sp.InputError, match="needs input_ids"):
        sections(config, {"pixel_values": torch.zeros(1)})
    with pytest.raises(sp.InputError, match="needs pixel_values as the processor gives them"):
        sections(config, {"input_ids": torch.zeros(1, 1, dtype=torch.long), "pixel_values": torch.zeros(1)})
    sizes = {"pixel_values": torch.zeros(1), "image_sizes": torch.tensor([[10, 10]])}
    with pytest.raises(sp.InputError, match="batch_num_images counts 2 pictures, but image_sizes has 1"):
        picture_tokens(model_of("llava_onevision").config, {**sizes, "batch_num_images": torch.tensor([1, 1])})


def drawn(name: str, *sizes: tuple[int, int], picked: tuple[int, ...] | None = None, **more: Any) -> Any:
    """A figure of one prompt in the second row of a batch; `picked` image tokens are selected, and all text."""
    pictures = [[], pictures_of([list(sizes)])[0]]
    inputs = encode(name, pictures)
    mask = None
    if picked is not None:
        columns = image_columns(name, inputs)
        mask = ~columns
        mask[1, columns[1].nonzero()[list(picked), 0]] = True
    config, processor = model_of(name).config, _zoo.processor_of(name)
    figure = plot_positions(config, inputs, pictures, mask, row=1, processor=processor, **more)
    figure.canvas.draw()
    return figure


def collections(axes: Any, label: str) -> Any:
    return [one for one in axes.collections if one.get_label() == label]


def test_selected_tokens_are_shaded_where_they_lie():
    whole, tiles = drawn("llava_next", (64, 40), picked=(1, 4, 5, 8)).axes
    assert whole.get_title() == "whole picture\n1 of 4 tokens selected"
    assert tiles.get_title() == "tiles\n2 of 8 tokens selected + 1 of 2 newlines"
    (selected,) = collections(whole, "selected")
    assert [path.get_extents().extents.tolist() for path in selected.get_paths()] == [[32, 0, 64, 20]]
    (selected,) = collections(tiles, "selected")
    # As by hand above: the grid covers 0.1 to 0.9 of the height.
    want = np.array([[0, 4, 16, 20], [16, 4, 32, 20]])
    np.testing.assert_allclose([path.get_extents().extents for path in selected.get_paths()], want, atol=1e-6)
    assert selected.get_hatch() == "////"
    assert tiles.get_xlim() == (0, 64)
    assert tiles.get_ylim() == (40, 0)
    np.testing.assert_array_equal(tiles.images[0].get_array(), np.asarray(_zoo.picture(64, 40)))


def test_a_panel_for_each_view_of_each_picture():
    panels = drawn("idefics3", (32, 16), (16, 32), picked=()).axes
    names = ["picture 0, tiles", "picture 0, whole picture", "picture 1, tiles", "picture 1, whole picture"]
    assert [axes.get_title().split("\n")[0] for axes in panels[:4]] == names
    assert [axes.axison for axes in panels] == [True] * 4 + [False] * 2
    (llava,) = drawn("llava", (64, 32)).axes
    assert llava.get_title() == "the part that the model sees\n4 tokens"
    (onevision, _) = drawn("llava_onevision", (40, 20), (20, 20)).axes
    assert onevision.get_title() == "picture 0, whole picture\n4 tokens + 1 newlines"
    assert onevision.get_ylim() == (30, -10)  # the padding is shown too


def test_values_share_their_colours():
    values = torch.arange(10.0).sub(3)
    values[2] = torch.nan
    values = torch.cat([values, values[:2]])
    tiles, whole, bar = drawn("idefics3", (32, 16), picked=(0, 9), values=values, label="gate").axes
    assert bar.get_ylabel() == "gate"
    (tile_cells,), (whole_cells,) = collections(tiles, "values"), collections(whole, "values")
    assert tile_cells.get_array().filled(np.nan).tolist()[3:] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert np.ma.getmaskarray(tile_cells.get_array()).tolist() == [False, False, True, *[False] * 5]
    assert whole_cells.get_array().tolist() == [5.0, 6.0, -3.0, -2.0]
    assert tile_cells.get_clim() == whole_cells.get_clim() == (-6.0, 6.0)
    (dots,) = collections(tiles, "selected")
    assert dots.get_offsets().tolist() == [[4.0, 4.0]]
    (dots,) = collections(whole, "selected")
    assert dots.get_offsets().tolist() == [[24.0, 4.0]]


def test_figure_refusals(monkeypatch: pytest.MonkeyPatch):
    pictures = [[], [_zoo.picture(32, 16)]]
    inputs, config = encode("qwen2_vl", pictures), model_of("qwen2_vl").config
    with pytest.raises(sp.InputError, match="rows 0 to 1, got 2"):
        plot_positions(config, inputs, pictures, row=2)
    with pytest.raises(sp.InputError, match="row 0 has no picture"):
        plot_positions(config, inputs, pictures)
    with pytest.raises(sp.InputError, match=r"mask is of \(1, 2\) tokens"):
        plot_positions(config, inputs, pictures, torch.ones(1, 2, dtype=torch.bool), row=1)
    with pytest.raises(sp.InputError, match="got 7 values for the 8 image tokens of row 1"):
        plot_positions(config, inputs, pictures, values=torch.ones(7), row=1)
    with pytest.raises(sp.InputError, match="none of the values is a finite number"):
        plot_positions(config, inputs, pictures, values=torch.full((8,), torch.nan), row=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(sp.FrameworkError, match="pip install"):
        plot_positions(config, inputs, pictures, row=1)
