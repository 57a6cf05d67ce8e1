"""Reading HLO text: loops multiply, asynchronous pairs count once, fused results are no buffers."""

import jax
import jax.numpy as jnp

from crab_jax.aot import hlo

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[128,256]) -> f32[128,256] {
  %p = bf16[128,256]{1,0} parameter(0)
  ROOT %wide = f32[128,256]{1,0} convert(%p)
}

%inner_body (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%s), index=1
  %sum = bf16[4,8]{1,0} all-reduce(%x), channel_id=3, to_apply=%add
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %sum)
}

%inner_condition (s: (s32[], bf16[4,8])) -> pred[] {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %w = bf16[32,256]{1,0} get-tuple-element(%s), index=1
  %start = (bf16[32,256]{1,0:T(8,128)(2,1)}, bf16[128,256]{1,0:T(8,128)(2,1)}) all-gather-start(%w), dimensions={0}
  %gathered = bf16[128,256]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  %copy = f32[128,256]{1,0} fusion(%gathered), kind=kLoop, calls=%fused
  ROOT %loop = (s32[], bf16[4,8]{1,0}) while(%s), condition=%inner_condition, body=%inner_body
}

%condition (s: (s32[], bf16[4,8])) -> pred[] {
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %both = (f32[10]{0}, f32[6,2]{1,0}) all-reduce(%g, %h), channel_id=1, to_apply=%add
  ROOT %out = (s32[], bf16[4,8]{1,0}) while(%s), condition=%condition, body=%body, KNOWN
}
""".replace("KNOWN", 'backend_config={"known_trip_count":{"n":"32"}}')


def test_collectives_of_nested_loops_are_multiplied_by_both_depths():
    assert hlo.collectives(hlo.ops(TEXT)) == {
        "all-gather": {"count": 32, "bytes": 32 * 128 * 256 * 2},
        "all-reduce": {"count": 1 + 32 * 5, "bytes": (10 + 12) * 4 + 32 * 5 * 4 * 8 * 2},
    }


def test_what_is_computed_inside_a_fusion_is_no_buffer():
    wide = [op for op in hlo.ops(TEXT) if hlo.Array("f32", (128, 256)) in op.results]
    assert {(op.opcode, op.fused, op.times) for op in wide} == {("convert", True, 32), ("fusion", False, 32)}


COPIES = """HloModule jit_step, is_scheduled=true

%widen (p: bf16[128,256], q: f32[]) -> f32[128,256] {
  %p = bf16[128,256]{1,0} parameter(0)
  %q = f32[] parameter(1)
  ROOT %wide = f32[128,256]{1,0} convert(%p)
}

%scale (p: bf16[128,256], q: f32[]) -> f32[128,256] {
  %p = bf16[128,256]{1,0} parameter(0)
  %wide = f32[128,256]{1,0} convert(%p)
  ROOT %product = f32[128,256]{1,0} multiply(%wide, %wide)
}

%body (s: (s32[], bf16[4,32,256])) -> (s32[], bf16[4,32,256]) {
  %s = (s32[], bf16[4,32,256]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stack = bf16[4,32,256]{2,1,0} get-tuple-element(%s), index=1
  %layer = bf16[32,256]{1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={1,32,256}
  %gathered = bf16[128,256]{1,0} all-gather(%layer), channel_id=7, dimensions={0}
  %again = bf16[128,256]{1,0} all-gather(%layer), channel_id=7, dimensions={0}
  %copy = f32[128,256]{1,0} fusion(%gathered, %i), kind=kLoop, calls=%widen
  %other = f32[128,256]{1,0} fusion(%gathered, %i), kind=kLoop, calls=%scale
  ROOT %t = (s32[], bf16[4,32,256]{2,1,0}) tuple(%i, %stack)
}

%condition (s: (s32[], bf16[4,32,256])) -> pred[] {
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (w: bf16[4,32,256]) -> (s32[], bf16[4,32,256]) {
  %w = bf16[4,32,256]{2,1,0} parameter(0), metadata={op_name="frozen[\\'w\\']"}
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,32,256]{2,1,0}) tuple(%zero, %w)
  ROOT %out = (s32[], bf16[4,32,256]{2,1,0}) while(%start), condition=%condition, body=%body, KNOWN
}
""".replace("KNOWN", 'backend_config={"known_trip_count":{"n":"4"}}')


def test_copies_of_an_argument_are_known_through_loops_gathers_and_conversions():
    source = {op.name: op.source for op in hlo.ops(COPIES)}
    assert source["w"] == source["stack"] == source["gathered"] == source["copy"] == "frozen['w']"
    assert source["other"] == source["zero"] == "", "a product is no copy"


def test_steps_of_one_collective_count_once():
    assert hlo.collectives(hlo.ops(COPIES)) == {"all-gather": {"count": 4, "bytes": 4 * 128 * 256 * 2}}


def test_the_trip_count_of_a_compiled_scan_is_found():
    def layers(x, weights):
        return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, weights)[0]

    text = jax.jit(layers).lower(jnp.ones((64, 64)), jnp.ones((7, 64, 64))).compile().as_text()
    bodies = [op.times for op in hlo.ops(text) if op.opcode == "tanh" or "tanh" in op.name]
    assert 7 in bodies, text


BETWEEN = """HloModule jit_step, is_scheduled=true

ENTRY %main (g: f32[8]) -> f32[8] {
  %g = f32[8]{0} parameter(0)
  %within = f32[8]{0} all-reduce(%g), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %pairs = f32[16]{0} all-gather(%g), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %neighbours = f32[16]{0} all-gather(%g), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
  %shifted = f32[8]{0} collective-permute(%g), channel_id=4, source_target_pairs={{0,1},{3,4}}
  %rotated = f32[8]{0} collective-permute(%g), channel_id=5, source_target_pairs={{0,1},{4,5}}
  %sent = (f32[4]{0}, u32[], token[]) send(%g, %t), channel_id=6, is_host_transfer=true, MEGASCALE
  %received = (f32[4]{0}, u32[], token[]) recv(%t), channel_id=7, is_host_transfer=true, MEGASCALE
  ROOT %out = f32[8]{0} add(%g, %g)
}
""".replace("MEGASCALE", 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}')


def test_a_group_with_chips_of_two_slices_crosses_them_and_so_does_a_transfer_through_the_hosts():
    assert hlo.by_network(hlo.ops(BETWEEN), 4) == {
        "ici": {
            "all-gather": {"count": 1, "bytes": 64},
            "all-reduce": {"count": 1, "bytes": 32},
            "collective-permute": {"count": 1, "bytes": 32},
        },
        "dcn": {
            "all-gather": {"count": 1, "bytes": 64},
            "all-reduce": {"count": 1, "bytes": 16},
            "collective-permute": {"count": 1, "bytes": 32},
        },
    }


def test_on_one_slice_nothing_crosses():
    within = hlo.by_network(hlo.ops(TEXT), 4)
    assert within == {"ici": hlo.collectives(hlo.ops(TEXT)), "dcn": {}}


def test_collectives_that_share_a_channel_and_not_a_result_are_two():
    text = BETWEEN.replace("channel_id=3", "channel_id=2").replace("%neighbours = f32[16]", "%neighbours = f32[24]")
    assert hlo.collectives(hlo.ops(text))["all-gather"] == {"count": 2, "bytes": 64 + 96}


def test_groups_along_the_axes_of_a_mesh():
    """As libtpu 0.0.42 writes them."""
    rest = "%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={1}"
    assert hlo._groups(rest) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert hlo._groups(rest.replace("{'a'}", "{'b'}")) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert hlo._groups("%x), replica_groups=mesh['a'=1,'b'=4] {'b'}") == ((0, 1, 2, 3),)
