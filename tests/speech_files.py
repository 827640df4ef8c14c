"""Speech for tests: each character is a tone of its own, 80 ms long, with a pause after it."""

import csv

import numpy as np
import soundfile

TEXTS = ["ab", "ba", "aab", "abc", "cab", "bca", "cc a", "b b", "acb", "bac", "c", "abba"]


def spoken(text, rate=16_000, seed=0):
    random = np.random.default_rng(seed)
    time = np.arange(int(0.08 * rate)) / rate
    pieces = [np.zeros(int(0.03 * rate))]
    for character in text:
        pitch = 0 if character == " " else 400 * (2 + ord(character) - ord("a"))
        pieces += [0.3 * np.sin(2 * np.pi * pitch * time), np.zeros(int(0.03 * rate))]
    wave = np.concatenate(pieces)
    return (wave + 0.003 * random.standard_normal(len(wave))).astype(np.float32)


def write_speech(folder, texts=TEXTS, rate=16_000, suffix="wav"):
    """Write a recording of each text and a list of them; returns the list's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "text"])
        for number, text in enumerate(texts):
            soundfile.write(folder / f"{number}.{suffix}", spoken(text, rate, number), rate)
            rows.writerow([f"{number}.{suffix}", text])
    return folder / "list.csv"
