"""`ggufloop shannon` as it is used: what it reads, prints and draws, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.cli import Cli

from ggufloop.errors import UsageError
from ggufloop.scaling.data import choose, read
from ggufloop.scaling.laws import LAWS, find

HEAD = "N,D,loss\n"
QUICK = ("--starts", "4", "--resamples", "20")


def run(cli: Cli, *words: str, code: int = 0) -> tuple[str, str]:
    ended = cli("shannon", *words)
    assert ended.code == code, ended.err
    return ended.out, ended.err


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A small family at two bit widths, as a CSV with counts, a non-embedding column, and columns nobody asked for."""
    path, law = tmp_path / "family.csv", find("chinchilla")
    theta, rng = np.log([0.7, 0.35, 2.0, 0.5, 2.2]), np.random.default_rng(1)
    rows = ["# trained here", "size,bits,N,D,loss,n_non_embedding"]
    for bits in (32, 4):
        for n in (0.2, 0.5, 1.0, 3.0):
            for d in 4 * 1.5 ** np.arange(8):
                loss = law.loss(theta, math.log(n), math.log(d))[0] + 0.1 * (bits == 4) + 0.01 * rng.normal()
                rows.append(f"m,{bits},{n},{d:.4f},{loss:.5f},{int(n * 0.8e9)}")
    path.write_text("\n".join(rows) + "\n")
    return path


# what it reads


def test_example_is_read_as_it_is() -> None:
    data = read("pythia")
    assert [(p.level, len(p), float(p.bits[0])) for p in data.levels] == [
        ("pretrain", 114, 16.0), ("4-bit", 102, 4.0), ("3-bit", 102, 3.0), ("2-bit", 102, 2.0)]  # fmt: skip
    two = data.levels[-1]
    assert math.exp(two.n[-1]), math.exp(two.d[-1]) == pytest.approx((11.85, 200.0))
    assert (two.loss[0], two.loss[-1]) == (5.188, 4.893)
    assert data.count == "total"
    assert "error about 0.05 nat" in data.source


def test_columns_of_sizes(family: Path) -> None:
    """N is billions or counts; --n chooses between what it may count."""
    data = read(str(family))
    assert ([p.level for p in data.levels], data.count, data.source) == (["32-bit", "4-bit"], "total", "trained here")
    assert np.exp(data.levels[0].sizes) == pytest.approx([0.2, 0.5, 1.0, 3.0])
    other = read(str(family), "non-embedding")
    assert np.exp(other.levels[0].sizes) == pytest.approx([0.16, 0.4, 0.8, 2.4])
    assert other.count == "non-embedding"
    only = family.with_name("only.csv")
    only.write_text("N_total,D,loss\n" + "".join(f"{n},{d},3\n" for n in (1, 2, 3) for d in (4, 5, 6)))
    assert read(str(only)).count == "total"
    with pytest.raises(UsageError, match="no column of non-embedding parameters"):
        read(str(only), "non-embedding")
    with pytest.raises(UsageError, match="sizes of pythia are total parameters"):
        read("pythia", "non-embedding")


def test_records_are_the_csv(family: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(family.read_text().split("\n", 1)[1])))
    path = family.with_suffix(".json")
    path.write_text(json.dumps([{k: float(row[k]) for k in ("N", "D", "loss", "bits")} for row in rows]))
    for a, b in zip(read(str(path)).levels, read(str(family)).levels, strict=True):
        np.testing.assert_array_equal([a.n, a.d, a.loss, a.bits], [b.n, b.d, b.loss, b.bits])


def test_levels_by_name() -> None:
    levels = read("pythia").levels
    assert [p.level for p in choose(levels, ["2-bit", "4-bit"])] == ["2-bit", "4-bit"]
    with pytest.raises(UsageError, match="level '2bit' is not in this data") as e:
        choose(levels, ["2bit"])
    assert e.value.hint.startswith("did you mean 2-bit?")


FULL = "".join(f"{n},{d},{3 + 1 / d}\n" for n in (1, 2, 3) for d in (4, 5, 6))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (HEAD + FULL + "1,7,-3\n", "loss -3 in all is not a positive number (1 of 10)", "nats per token"),
        (HEAD + FULL + "1,7,nan\n", "loss nan in all is not a positive number (1 of 10)", "nats per token"),
        (HEAD + FULL + "1,7,0\n", "loss 0 in all is not a positive number (1 of 10)", "nats per token"),
        (HEAD + FULL + "1,0,3\n", "1 of 10 D in all are not positive numbers", "without training"),
        (HEAD + FULL + "big,7,3\n", "row 10 of DATA: N 'big' is not a number", "correct or drop it"),
        (HEAD + FULL + "1,7\n", "rows of another length than its header", "every row each column"),
        (HEAD + "1,4,3\n1,5,3\n1,6,3\n", "all of DATA has one size", "ggufloop shannon ladder"),
        (HEAD + "1,4,3\n2,4,3\n3,4,3\n", "all of DATA has one token budget", "ggufloop shannon ladder"),
        (HEAD + FULL + "160000000,7,3\n", "N goes from 1 to 1.6e+08", "in billions"),
        ("N,D,los\n1,2,3\n", "has no column loss", "did you mean los?"),
        ("N,loss\n1,2\n", "has no column D", "Needed: N, D, loss"),
        (HEAD, "has no rows", "N,D,loss[,bits]"),
        ("N,D,loss,bits\n1,4,3,0\n", "0 bits are not above 0", "leave the cell empty"),
        ('{"sizes": [1]}', "has no 'sets'", "list of records"),
        ('{"sizes": [1, 2], "sets": {"a": {"tokens": [4]}}}', "a set of DATA has no 'loss'", "a row per size"),
        ('{"sizes": [1, 2], "sets": {"a": {"tokens": [4], "loss": [[3]]}}}', "losses of shape (1, 1)", "2 sizes x 1"),
        ("[1]", "is not a list of records", '"N": 0.16'),
        ("[]", "has no records", "N, D and loss"),
    ],
)
def test_bad_data(tmp_path: Path, cli: Cli, text: str, message: str, hint: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    out, err = run(cli, "fit", str(path), code=2)
    first, second = err.rstrip("\n").split("\n")
    assert out == ""
    assert message.replace("DATA", str(path)) in first
    assert hint in second


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["fit", "pytia"], 1, "did you mean pythia?"),
        (["fit", "missing.csv"], 1, "cannot read missing.csv"),
        (["fit", "pythia", "--law", "chinchila"], 2, "did you mean chinchilla?"),
        (["fit", "pythia", "--level", "5-bit"], 2, "level '5-bit' is not in this data"),
        (["fit", "pythia", "--n", "all"], 2, "known: total, non-embedding"),
        (["fit", "pythia", "-o", "xml"], 2, "output form 'xml' is not known"),
        (["fitt", "pythia"], 2, "did you mean fit?"),
        (["predict", "pythia", "--N", "x", "--D", "3"], 2, "--N 'x' is not a number above 0"),
        (["predict", "pythia", "--N", "1", "--D", "-3"], 2, "--D '-3' is not a number above 0"),
        (["predict", "pythia", "--N", ",", "--D", "3"], 2, "no size or no budget is given"),
        (["plot", "pythia", "x.doc"], 2, "no format matplotlib can write"),
        (["ladder", "llama3-8b", "--snr", "20", "--bits", "2.6"], 2, "2.6 bits per weight are below 3"),
        (["ladder", "llama3-8b", "--snr", "10.5"], 2, "10.5 dB are below 12 dB"),
        (["ladder", "llama3-8b", "--snr", "loud"], 2, "--snr 'loud' is not a number"),
    ],
)
def test_mistakes(cli: Cli, words: list[str], code: int, message: str) -> None:
    out, err = run(cli, *words, code=code)
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_too_few_for_the_law_asked_for(family: Path, cli: Cli) -> None:
    text = "".join(line for line in family.read_text().splitlines(True) if ",3.0," not in line)
    family.write_text(text)
    _, err = run(cli, "fit", family, "--law", "shannon", code=2)
    assert "shannon has 8 parameters and needs 4 sizes x 8 token budgets; 32-bit has 3 x 8." in err
    out, _ = run(cli, "fit", family, "--law", "shannon,openai", *QUICK)
    assert "* Not fitted: shannon has 8 parameters" in out


# what it prints


def test_fit_prints_the_findings_beside_the_fit(family: Path, cli: Cli) -> None:
    out, _ = run(cli, "fit", family, *QUICK)
    blocks = out.split("\n\n")
    assert "64 points, levels 32-bit, 4-bit" in blocks[0]
    assert "N: billions of total parameters" in blocks[0]
    assert "trained here" in blocks[0]
    for title in ("All levels together", "Local slopes of shannon", "Constants of shannon", "What to know about 4-bit"):
        assert title in out
    table = [line.split("|")[1:-1] for line in blocks[1].splitlines() if line.startswith("|")]
    assert [(row[0].strip(), row[1].strip()) for row in table[2:]] == [
        (x, law) for x in ("32-bit", "4-bit") for law in LAWS
    ]
    assert "one fit, X = bits" in out
    assert "none in range" in out


def test_forms_carry_the_same_numbers(family: Path, cli: Cli) -> None:
    words = ("fit", family, "--law", "chinchilla,openai", "--level", "4-bit", *QUICK)
    whole = json.loads(run(cli, *words, "-o", "json")[0])
    (level,) = whole["levels"]
    assert (level["level"], level["bits"], level["n"], level["sizes"], level["budgets"]) == ("4-bit", 4.0, 32, 4, 8)
    chinchilla = level["laws"]["chinchilla"]
    assert chinchilla["constants"]["c"] == pytest.approx(2.3, abs=0.2)
    assert chinchilla["held_out"]["tested"] == 2
    assert level["main"] == "chinchilla"
    assert level["constants"]["c"]["low"] < chinchilla["constants"]["c"] < level["constants"]["c"]["high"]
    assert whole["settings"]["starts"] == 4
    rows = list(csv.DictReader(io.StringIO(run(cli, *words, "-o", "csv")[0])))
    assert [row["law"] for row in rows] == ["chinchilla", "openai"]
    assert float(rows[0]["rmse"]) == chinchilla["rmse"]
    assert f"{chinchilla['rmse']:.4f}" in run(cli, *words, "-o", "md")[0]
    assert run(cli, *words, "-o", "json")[0] == run(cli, *words, "-o", "json")[0]  # the seed decides


def test_predict_says_where_it_does_not_know(cli: Cli) -> None:
    words = ("predict", "pythia", "--level", "2-bit", "--N", "6.86,40", "--D", "100", "--resamples", "40")
    out, _ = run(cli, *words)
    assert "2-bit: N = 40 is outside the data (0.162 to 11.8)." in out
    assert "held out (n = 5), shannon missed by 0.68" in out
    assert "Do not extrapolate." in out
    (level,) = json.loads(run(cli, *words, "-o", "json")[0])["levels"]
    inside, beyond = level["predictions"]
    assert inside["loss"]["low"] < 4.34 < inside["loss"]["high"] < 4.6  # measured: 4.287 and 4.388 around it
    assert (inside["outside"], inside["best_size"]["estimate"]) == ("", None)
    assert 10 < inside["best_budget"]["estimate"]["mean"] < 40
    assert beyond["loss"]["high"] - beyond["loss"]["low"] > inside["loss"]["high"] - inside["loss"]["low"]


def test_plots_are_written(tmp_path: Path, family: Path, cli: Cli) -> None:
    target = tmp_path / "loss.png"
    run(cli, "plot", family, target, "--law", "chinchilla", *QUICK)
    assert target.read_bytes()[:4] == b"\x89PNG"
    assert target.stat().st_size > 30_000
    run(cli, "ladder", "llama3-8b", "--plot", tmp_path / "line.svg")
    drawn = (tmp_path / "line.svg").read_text()
    for word in ("q8_0", "q2_K", "left out (below 3 bits)", "R2 0.994, n = 6", "SNR of the weights (dB)"):
        assert word in drawn
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family.csv", "line.svg", "loss.png"]


def test_ladder_prints_the_line_and_what_it_cannot_tell(cli: Cli) -> None:
    out, _ = run(cli, "ladder", "llama3-8b", "--snr", "25,14")
    assert "log10 KLD = 0.623 - 0.829 SNR/10" in out
    assert "KLD of each file predicted from the others, 95 % intervals: 6 of 6 inside" in out
    assert "One checkpoint cannot tell alpha, beta, gamma or delta" in out
    assert "Left out, below 3 bits: q2_K." in out
    assert "Outside the files fitted (16.4 to 45.4 dB): 14 dB." in out
    whole = json.loads(run(cli, "ladder", "llama3-8b", "-o", "json")[0])
    assert [fit["of"] for fit in whole["fits"]] == ["KLD", "loss"]
    assert len(list(csv.DictReader(io.StringIO(run(cli, "ladder", "llama3-8b", "-o", "csv")[0])))) == 12


def test_short_ladders(tmp_path: Path, cli: Cli) -> None:
    """Three files hold a line but none to spare; two hold nothing."""
    path = tmp_path / "ladder.csv"
    path.write_text("type,snr_db,kld\nQ8_0,45,0.001\nQ6_K,35,0.006\nQ4_0,21,0.08\n")
    out, _ = run(cli, "ladder", path)
    assert "n = 3 files" in out
    assert "Too few files to predict one from the others." in out
    path.write_text("type,snr_db,kld\nQ8_0,45,0.001\nQ2_K,10.5,0.6\nQ4_0,21,0.08\n")
    _, err = run(cli, "ladder", path, code=2)
    assert "2 of 3 files have a noise to fit and 3 bits or more; 3 are needed." in err
