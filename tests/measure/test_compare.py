import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from tadsr.images import ArrayImage, write_image
from tadsr.images.color_space import profile_of_code_points
from tadsr.measure.compare import compare_images, draw_comparison
from tadsr.measure.metrics import psnr
from tadsr.measure.pictures import read_rgb8, to_rgb8
from tadsr.measure.regions import Box, detail_map, difference_map, find_box
from tadsr.measure.sheet import MAX_COLUMNS, Panel, draw_sheet


def noise(height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
)
def test_the_box_found_has_the_largest_product_of_means(shape, size):
    rng = np.random.default_rng(shape[0])
    scores = [rng.random(shape), rng.random(shape)]
    width, height = min(size[0], shape[1]), min(size[1], shape[0])

    def product(left, top):
        return np.prod([s[top : top + height, left : left + width].mean() for s in scores])

    box = find_box(scores, size)
    assert (box.right - box.left, box.bottom - box.top) == (width, height)
    best = max(
        product(left, top)
        for left in range(shape[1] - width + 1)
        for top in range(shape[0] - height + 1)
    )
    assert product(box.left, box.top) == pytest.approx(best)


def test_where_nothing_differs_the_middle_is_shown():
    assert find_box([np.zeros((10, 20))], (4, 2)) == Box(8, 4, 12, 6)


def test_maps_show_differences_and_detail_where_they_are():
    flat = np.full((8, 9, 3), 100, np.uint8)
    spot = flat.copy()
    spot[2, 3] = 120
    changed = difference_map([flat, spot, flat])
    assert changed[2, 3] > 15
    changed[2, 3] = 0
    assert not changed.any()
    assert detail_map(spot).argmax() == 2 * 9 + 3
    assert not detail_map(flat).any()


def test_a_sheet_shows_every_panel_and_the_part_enlarged():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    panels = [Panel(str(c), np.full((30, 40, 3), c, np.uint8)) for c in colors]
    box = Box(4, 4, 24, 14)
    sheet = np.asarray(draw_sheet(panels, box, panel_px=80))
    for color in colors:
        found = (sheet == color).all(axis=2)
        # The whole at 80 × 60 px less its frame, and the part at 80 × 40 px.
        assert 80 * 60 - 2 * 2 * (40 + 20) <= found.sum() - 80 * 40 <= 80 * 60
    assert MAX_COLUMNS == 4  # so that five come in rows of three and two
    assert sheet.shape[1] == 3 * 90 + 10
    with pytest.raises(ValueError, match="must have one size, got 40×30"):
        draw_sheet([*panels, Panel("x", noise())], box)
    with pytest.raises(ValueError, match="inside 40×30 px"):
        draw_sheet(panels, Box(0, 0, 41, 10))


def test_pictures_are_compared_pair_by_pair():
    hq = noise()
    a, b = hq.copy(), hq.copy()
    b[30:40, 20:30] ^= 16
    found = compare_images(a, b, hq, names=("a", "b", "hq"), border_px=0)
    assert list(found.figures) == [("a", "b"), ("a", "hq"), ("b", "hq")]
    assert found.figures["b", "hq"]["psnr_y"] == psnr(b, hq)
    assert found.figures["a", "hq"]["psnr_rgb"] == float("inf")
    assert found.figures["a", "hq"]["ssim_y"] == 1
    assert 20 <= found.box.left + 8 <= 30
    assert 30 <= found.box.top + 8 <= 40
    # Differences of 16 are amplified up to, and not beyond, what 8 bits hold.
    assert found.amplification == {("a", "b"): 15, ("a", "hq"): 15, ("b", "hq"): 15}
    sheet = draw_comparison(found, a, b, hq, panel_px=64)
    assert sheet.size[0] == 3 * 74 + 10
    three = compare_images(a, b)
    assert list(three.figures) == [("A", "B")]
    assert draw_comparison(three, a, b, panel_px=64).size[1] < sheet.size[1]


def test_differences_to_the_original_share_their_factor():
    hq = np.full((32, 32, 3), 100, np.uint8)
    found = compare_images(hq + np.uint8(50), hq + np.uint8(51), hq)
    assert found.amplification == {("A", "B"): 64, ("A", "HQ"): 5, ("B", "HQ"): 5}


def test_a_long_label_stays_over_its_panel():
    panel = Panel("a_very_long_name_of_a_file.png", np.zeros((8, 8, 3), np.uint8))
    sheet = np.asarray(draw_sheet([panel, Panel("", panel.image)], Box(0, 0, 8, 8), panel_px=60))
    assert (sheet[:38, :70] < 128).any()
    assert (sheet[:38, 71:] == 255).all()


def test_different_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"one size, got 64×48 px \(x\), 64×40 px \(y\)"):
        compare_images(noise(), noise(40), names=("x", "y"))
    with pytest.raises(ValueError, match="names must be different"):
        compare_images(noise(), noise(), names=("x", "x"))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_are_taken_as_viewers_show_them(dtype, channels, tmp_path):
    pixels = np.full((8, 8, channels), 255, np.uint8)
    pixels[..., :3] = (120, 150, 100)
    pixels = pixels if dtype == np.uint8 else pixels.astype(np.uint16) * 257
    display_p3 = profile_of_code_points(12, 13, b"RGB ")
    for profile, seen in ((display_p3, (112, 151, 94)), (SRGB, (120, 150, 100))):
        image = Image.fromarray(pixels) if dtype == np.uint8 else ArrayImage(pixels)
        image.info["icc_profile"] = profile
        write_image(image, tmp_path / "a.png")
        assert np.abs(read_rgb8(tmp_path / "a.png")[4, 4] - np.array(seen)).max() <= 1


def test_grey_profiles_and_transparency_are_seen_too():
    gray = Image.new("L", (2, 2), 128)
    gray.info["icc_profile"] = profile_of_code_points(1, 8, b"GRAY")
    assert np.abs(to_rgb8(gray).astype(int) - 188).max() <= 1  # linear 0.5
    clear = Image.new("RGBA", (2, 2), (255, 0, 255, 0))
    assert (to_rgb8(clear) == 255).all()
    assert to_rgb8(Image.new("RGBA", (1, 1), (0, 0, 0, 51))).tolist() == [[[204] * 3]]
