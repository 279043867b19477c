"""Colours by name: which a picture has, and a drawing in another one."""

import colorsys

import numpy as np
from PIL import Image

# Name → where its hue begins and ends, in degrees; of what is neither dark nor grey.
HUES = {
    "red": (-20, 14), "orange": (14, 40), "yellow": (40, 65), "green": (65, 165),
    "blue": (165, 250), "purple": (250, 305),
}  # fmt: skip
BLACK, WHITE, GREY = 0.35, 0.8, 0.15  # value below, value above, saturation below
BROWN = (8, 40, 0.8)  # its hue from and to, and the value below which orange is brown
BACKGROUND = 240  # of 255: what has all channels at least there is background
# Name → the hue that a drawing is turned to, and factors of its saturation and value.
TURNED = {
    "red": (354, 1.1, 0.9), "orange": (30, 1.1, 1), "yellow": (47, 0.9, 1.05),
    "green": (110, 0.8, 0.8), "blue": (207, 0.9, 1), "purple": (272, 0.8, 0.9),
    "brown": (20, 0.8, 0.6), "black": (210, 0.2, 0.3),
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
    if (distance(hues, best) <= NEAR).mean() < ONE_COLOUR[0]:
        return None
    return best


def distance(hues, hue):
    """Degrees between hues and a hue, 0 to 180."""
    return np.abs((hues - hue + 180) % 360 - 180)


def turned(image, hue, colour):
    """An RGBA drawing with what is near its main hue in another colour; what else it has stays."""
    to, saturation, value = TURNED[colour]
    hsv = np.asarray(image.convert("RGB").convert("HSV"), np.float64) / 255  # (H, W, 3)
    near = (distance(hsv[..., 0] * 360, hue) <= NEAR) & (hsv[..., 1] > COLOURED / 2)
    new = hsv.copy()
    off = (hsv[..., 0] * 360 - hue + 180) % 360 - 180
    new[..., 0] = (to + off / 2) % 360 / 360
    new[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 1)
    new[..., 2] = np.clip(hsv[..., 2] * value, 0, 1)
    result = np.where(near[..., None], new, hsv)
    rgb = Image.fromarray(np.uint8(result * 255 + 0.5), "HSV").convert("RGB")
    rgb.putalpha(image.getchannel("A"))
    return rgb
