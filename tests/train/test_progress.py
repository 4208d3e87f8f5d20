import io

from rich.console import Console

from elastictok.train._progress import Bar, Lines, Silent, describe, display

METRICS = {
    "loss": 0.12345,
    "psnr": 18.26,
    "steps_per_second": 2.5,
    "tokens_per_second": 25_600.0,
    "waiting_for_data": 0.031,
}


def test_one_line_says_it_all():
    speed = "25.6k tokens/s  3% waiting for data  1:06:00 left"
    assert describe(100, 10_000, METRICS) == f"loss 0.1235  PSNR 18.3 dB  {speed}"
    known = METRICS | {"mse_full": 0.0123, "mse_quarter": 0.00045}
    text = describe(100, 10_000, known)
    assert text == f"loss 0.1235  MSE 0.0123 full, 4.5e-04 quarter  {speed}"


def test_lines_come_now_and_then_and_at_the_end():
    stream = io.StringIO()
    lines = Lines(Console(file=stream, width=40), steps=3, seconds=1000.0)
    for step in (1, 2, 3):
        lines.step(step)
        lines.metrics(step, METRICS)
    printed = stream.getvalue().splitlines()
    assert [line.split()[1] for line in printed] == ["1/3", "3/3"]  # in one piece, however narrow


def test_a_bar_draws_where_the_run_is():
    stream = io.StringIO()
    bar = Bar(Console(file=stream, force_terminal=True, width=100), start=4, steps=9, seconds=0.0)
    bar.step(5)
    bar.metrics(6, METRICS)
    bar.say("compiled [in] 3 s")
    bar.close()
    printed = stream.getvalue()
    for text in ("5/9", "6/9", "loss 0.1235", "compiled [in] 3 s"):
        assert text in printed


def test_no_progress_is_silent(capsys):
    silent = display(progress=False, start=0, steps=3)
    assert isinstance(silent, Silent)
    silent.say("x")
    silent.step(1)
    silent.metrics(1, METRICS)
    silent.close()
    assert capsys.readouterr() == ("", "")


def test_away_from_a_terminal_there_are_lines(capsys):
    shown = display(progress=True, start=0, steps=3)
    assert isinstance(shown, Lines)
    shown.metrics(1, METRICS)
    assert "step 1/3" in capsys.readouterr().err
