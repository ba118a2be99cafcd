"""What of an acceleration is left when it has ended, or a forward of it was interrupted."""

import pytest
from runs import on, run
from tiny import tiny_wan

from dit_accel import TokenPruning


@pytest.mark.parametrize(
    "options", [{"method": "shared@0.3"}, {"method": "dense", "prune": "stale"}], ids=str
)
def test_what_was_kept_is_let_go_though_the_handle_lives(options):
    pipe = tiny_wan(layers=4)
    if "prune" in options:
        options = {**options, "prune": TokenPruning(keep=0.5, start=1, end=0, context="stale")}
    with on(pipe, **options) as handle:
        run(pipe)
        kept = handle.report().state_bytes
    engine = handle._engine
    tensors = [x for entry in engine.state.values() for x in entry.values()]
    tensors += [x for span in engine.spans for m in span.memory.values() for x in m.tensors()]
    tensors += [x for span in engine.spans if span.context for x in span.context.memory]
    assert not tensors and handle.report().state_bytes == kept > 0


def test_a_block_of_an_interrupted_forward_takes_what_is_set_on_it():
    pipe = tiny_wan(layers=4)

    def interrupt(module, inputs):
        raise KeyboardInterrupt

    with on(pipe, "dense", prune=TokenPruning(keep=0.5, start=1, end=0)):
        hook = pipe.transformer.blocks[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(pipe)
        hook.remove()
        for block in pipe.transformer.blocks:
            block.mine = "set"
    assert [block.mine for block in pipe.transformer.blocks] == ["set"] * 4
    for block in pipe.transformer.blocks:
        del block.mine
