from lminf.run.clock import PhaseTimer


def test_time_is_split_and_goes_on_after_a_restart():
    now = [0.0]
    split = PhaseTimer(
        {"seconds_train": 10, "seconds_save": 1.0, "seconds_eval": "x"}, clock=lambda: now[0]
    )
    now[0] = 2.0
    with split.part("eval"):
        now[0] = 5.0
        with split.part("save"):  # belongs to what it happens in
            now[0] = 6.0
    now[0] = 6.5
    assert split.seconds() == {
        "seconds_compile": 0.0, "seconds_train": 12.5, "seconds_eval": 4.0, "seconds_save": 1.0
    }  # fmt: skip


def test_only_the_first_call_of_a_shape_compiles():
    now = [0.0]

    def slow(x):
        now[0] += 1
        return x

    split = PhaseTimer(clock=lambda: now[0])
    call = split.compiling(slow, key=lambda x: x)
    for x in (1, 1, 2, 1):
        call(x)
    assert split.seconds()["seconds_compile"] == 2.0
    assert split.seconds()["seconds_train"] == 2.0
