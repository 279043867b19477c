"""Colours by name: which a picture has, and a drawing in another one."""

import colorsys

import numpy as np
from PIL import Image

# Name → where its hue begins and ends, in degrees; of what is neither dark nor grey.
HUES = {
    "red": (-20, 14), "orange": (14, 40), "yellow": (40, 65), "green": (65, 165),
    "blue": (165, 250), "purple": (250, 305),
}  # fmt: skip
BLACK, WHITE, GREY = 0.35, 0.6, 0.15  # value below, value above, saturation below
BROWN = (8, 40, 0.8)  # its hue from and to, and the value below which orange is brown
BACKGROUND = 240  # of 255: what has all channels at least there is background
# Name → hue, saturation and value that the middle of a drawing is turned to.
TURNED = {
    "red": (354, 0.8, 0.88), "orange": (30, 0.92, 0.97), "yellow": (48, 0.75, 1),
    "green": (110, 0.6, 0.72), "blue": (207, 0.7, 0.95), "purple": (272, 0.55, 0.8),
    "brown": (20, 0.62, 0.5), "black": (210, 0.2, 0.25),
}  # fmt: skip
COLOURED = 0.25  # saturation from which a pixel counts as coloured
NEAR = 30  # degrees from the main hue within which pixels are turned with it
ONE_COLOUR = 0.7, 0.35  # least share of the main hue among what is coloured; of that in the drawing


def name_of(rgb):
    """The name of a colour, of 255: one of nine, or None for what lies between (pink, grey)."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(part) / 255 for part in rgb))
    if value < BLACK:
        return "black"
    if saturation < GREY:
        return "white" if value > WHITE else None
    degrees = hue * 360
    if BROWN[0] <= degrees < BROWN[1] and value < BROWN[2]:
        return "brown"
    degrees -= 360 if degrees >= 340 else 0
    return next((name for name, (low, high) in HUES.items() if low <= degrees < high), None)


def main_colour(image):
    """The median colour, (3,) of 255, of what an RGB image (H, W, 3) shows on white; None where it
    shows nothing.
    """
    shown = image[(image < BACKGROUND).any(axis=-1)]  # (pixels, 3)
    return np.median(shown, axis=0) if len(shown) else None


def main_hue(image):
    """The hue, in degrees, that most of an RGBA drawing has; None unless it has one main colour."""
    drawn = np.asarray(image)[..., 3] > 127  # (H, W)
    hsv = np.asarray(image.convert("RGB").convert("HSV"), np.float64) / 255
    coloured = drawn & (hsv[..., 1] > COLOURED) & (hsv[..., 2] > BLACK)
    if not coloured.any() or coloured.sum() < ONE_COLOUR[1] * drawn.sum():
        return None
    hues = hsv[..., 0][coloured] * 360  # (pixels,)
    counts = np.histogram(hues, bins=72, range=(0, 360))[0]
    around = sum(np.roll(counts, by) for by in range(-5, 6))
    best = around.argmax() * 5 + 2.5
    off = beyond(hues, best)  # (pixels,)
    near = np.abs(off) <= NEAR
    return None if near.mean() < ONE_COLOUR[0] else float((best + off[near].mean()) % 360)


def beyond(hues, hue):
    """How many degrees hues are beyond a hue, -180 to 180."""
    return (hues - hue + 180) % 360 - 180


def turned(image, hue, colour):
    """An RGBA drawing with what is near its main hue in another colour; what else it has stays."""
    to, *wanted = TURNED[colour]
    hsv = np.asarray(image.convert("RGB").convert("HSV"), np.float64) / 255  # (H, W, 3)
    off = beyond(hsv[..., 0] * 360, hue)  # (H, W)
    near = (np.abs(off) <= NEAR) & (hsv[..., 1] > COLOURED / 2)
    shown = near & (np.asarray(image)[..., 3] > 127)
    middle = np.maximum(np.median(hsv[shown][:, 1:], axis=0), 0.01)  # (2,)
    new = np.concatenate(
        [((to + off / 2) % 360 / 360)[..., None], hsv[..., 1:] * wanted / middle], axis=-1
    ).clip(0, 1)  # (H, W, 3)
    result = np.where(near[..., None], new, hsv)
    rgb = Image.fromarray(np.uint8(result * 255 + 0.5), "HSV").convert("RGB")
    rgb.putalpha(image.getchannel("A"))
    return rgb
