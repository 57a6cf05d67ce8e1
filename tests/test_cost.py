"""The compiler's estimate of a program's time, by what it is spent on."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from crab_jax.aot import cost, flops, hlo
from crab_jax.parallel import chips

V5E = next(chip for chip in chips.CHIPS if chip.name == "v5e")
STEP = "jit(step)/transpose(jvp(Crab))/llama/while/body/closed_call/checkpoint"
AGAIN = f"{STEP}/rematted_computation/layers"


def cycles(number):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{number}","iteration_bounds":["4"]}}}}'


def named(path):
    return f'metadata={{op_name="{path}" stack_frame_id=7}}'


UP = named(f"{AGAIN}/mlp/up_proj/dot_general")
# A loop over 32 layers: a base product, the bits and the product of a low-rank one in one fusion, attention with its
# softmax in one fusion, a kernel whose attributes go over several lines, a copy without a name.
TEXT = f"""HloModule jit_step, is_scheduled=true

%base (p: bf16[2048,4096], w: bf16[4096,4096]) -> bf16[2048,4096] {{
  %p = bf16[2048,4096]{{1,0}} parameter(0)
  %w = bf16[4096,4096]{{1,0}} parameter(1)
  ROOT %dot = bf16[2048,4096]{{1,0}} convolution(%p, %w), dim_labels=bf_io->bf, {UP}
}}

%low (p: bf16[2048,4096], w: bf16[4096,8]) -> bf16[2048,8] {{
  %p = bf16[2048,4096]{{1,0}} parameter(0)
  %w = bf16[4096,8]{{1,0}} parameter(1)
  %bits = u32[2048,4096]{{1,0}} xor(%p, %p), {named(f"{AGAIN}/mlp/up_proj/Dropout_0/jit(_bernoulli)/threefry2x32")}
  ROOT %dot = bf16[2048,8]{{1,0}} convolution(%p, %w), dim_labels=bf_io->bf, {UP}
}}

%scores (q: bf16[64,1024,128], k: bf16[64,1024,128]) -> f32[64,1024,1024] {{
  %q = bf16[64,1024,128]{{2,1,0}} parameter(0)
  %k = bf16[64,1024,128]{{2,1,0}} parameter(1)
  ROOT %dot = f32[64,1024,1024]{{2,1,0}} convolution(%q, %k), window={{size=64 pad=0_63}}, dim_labels=0bf_0oi->0bf, \
{named("jit(step)/jvp(Crab)/llama/while/body/closed_call/layers/self_attn/bkgld,bknd->bkgln/dot_general")}
}}

%body (s: (s32[], bf16[2048,4096])) -> (s32[], bf16[2048,4096]) {{
  %s = (s32[], bf16[2048,4096]{{1,0}}) parameter(0)
  %x = bf16[2048,4096]{{1,0}} get-tuple-element(%s), index=1
  %up = bf16[2048,4096]{{1,0}} fusion(%x, %w), kind=kOutput, calls=%base, {named(f"{AGAIN}/mlp/up_proj/add")}, \
{cycles(600000)}
  %a = bf16[2048,8]{{1,0}} fusion(%x, %a8), kind=kOutput, calls=%low, {cycles(150000)}
  %sc = f32[64,1024,1024]{{2,1,0}} fusion(%q, %k), kind=kOutput, calls=%scores, {cycles(900000)}
  %mha.1 = bf16[2,8,1024,128]{{3,2,1,0}} custom-call(%q, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{}}"
}}}}, {named("jit(step)/jvp(Crab)/llama/layers/self_attn/mha/pallas_call")}
  %copied = bf16[2048,4096]{{1,0}} copy(%x), {cycles(1500)}
  ROOT %t = (s32[], bf16[2048,4096]{{1,0}}) tuple(%i, %up)
}}

%condition (s: (s32[], bf16[2048,4096])) -> pred[] {{
  ROOT %yes = pred[] constant(true)
}}

ENTRY %main (s: (s32[], bf16[2048,4096])) -> (s32[], bf16[2048,4096]) {{
  %s = (s32[], bf16[2048,4096]{{1,0}}) parameter(0)
  %adam = f32[4096,8]{{1,0}} add(%m, %g), {named("jit(step)/add")}, {cycles(3000)}
  ROOT %out = (s32[], bf16[2048,4096]{{1,0}}) while(%s), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"32"}}}}
}}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.ops(TEXT)


def test_the_estimate_is_the_sum_of_cycles_times_runs_over_the_clock(program):
    times = cost.spent([op for op in program if op.opcode != "custom-call"], V5E)
    wanted = (32 * (600000 + 150000 + 900000 + 1500) + 3000) / 1.5e9
    assert sum(cost.by_part(times).values()) == pytest.approx(wanted)
    assert sum(cost.by_pass(times).values()) == pytest.approx(wanted)
    assert cost.by_pass(times)["recomputed"] == pytest.approx(32 * 750000 / 1.5e9)


def test_parts_are_told_by_name_and_shape_and_bits_take_what_the_product_would_not(program):
    parts = cost.by_part(cost.spent([op for op in program if op.opcode != "custom-call"], V5E))
    low = 32 * 2 * 2048 * 4096 * 8 / V5E.flops / cost.PRODUCT_SHARE
    products = 32 * 2 * 64 * 1024 * 1024 * 128 / V5E.flops / cost.PRODUCT_SHARE
    assert parts == pytest.approx(
        {
            "base": 32 * 600000 / 1.5e9,
            "lora": low,
            "dropout_bits": 32 * 150000 / 1.5e9 - low,
            "attention": products,
            "softmax": 32 * 900000 / 1.5e9 - products,
            "optimizer": 3000 / 1.5e9,
            "other": 32 * 1500 / 1.5e9,
        }
    )


def test_a_kernel_takes_its_roofline_and_at_least_its_bytes(program):
    call = next(op for op in program if op.opcode == "custom-call")
    results = ((2, 8, 1024, 128),)
    slow = flops.Kernel("mha", results, flops.Work(2 * V5E.flops, 1.0), 0.0)
    other = flops.Kernel("mha", ((1, 8, 1024, 128),), flops.Work(9 * V5E.flops, 1.0), 0.0)
    vector = flops.Kernel("mha", results, flops.Work(), 3 * V5E.vector_ops)

    def parts(*kernels):
        return cost.by_part(cost.spent([call], V5E, kernels))

    assert parts(other, slow) == pytest.approx({"attention": 32 * 2})
    assert parts(vector) == pytest.approx({"attention": 32 * 3})
    assert parts() == pytest.approx({"attention": 32 * 2 * 8 * 1024 * 128 * 2 / V5E.hbm_bandwidth})


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(step)/jvp(Crab)/clip/layers/self_attn/q_proj/dot_general", "encoders"),
        ("jit(step)/transpose(jvp(Crab))/al_projector/layers/mlp/dot_general", "qformers"),
        ("jit(step)/jvp(Crab)/seg_module/up/conv_general_dilated", "mask_decoder"),
        ("jit(step)/jvp(Crab)/llama.logits/lm_head/dot_general", "loss"),
        ("jit(step)/jvp()/reduce_max", "loss"),
        ("jit(step)/jvp(Crab)/llama/while/body/closed_call/layers/self_attn/concatenate", "rope"),
        ("jit(step)/jvp(Crab)/llama/while/body/closed_call/layers/self_attn/exp", "softmax"),
        ("jit(step)/jvp(Crab)/llama/while/body/closed_call/layers/input_layernorm/mul", "norms"),
        ("jit(step)/jvp(Crab)/llama/while/body/closed_call/layers/mlp/mul", "activation"),
        ("jit(step)/jvp(Crab)/llama/while/body/jit(dynamic_index_in_dim)/dynamic_slice", "stacks"),
        ("jit(step)/sqrt", "optimizer"),
        ("", "other"),
    ],
)
def test_the_part_of_an_operation_that_is_no_product(path, part):
    assert cost.part_of(path, hlo.Op("x", "fusion", (), 1, False), None) == part


GPU = f"""HloModule jit_step, is_scheduled=true

%slices (stack: bf16[32,4096,1024], at: s32[]) -> bf16[1,4096,1024] {{
  %stack = bf16[32,4096,1024]{{2,1,0}} parameter(0)
  %at = s32[] parameter(1)
  ROOT %part = bf16[1,4096,1024]{{2,1,0}} dynamic-slice(%stack, %at, %at, %at), dynamic_slice_sizes={{1,4096,1024}}
}}

%update (stack: bf16[32,4096,1024], new: bf16[4096,1024], at: s32[]) -> bf16[32,4096,1024] {{
  %stack = bf16[32,4096,1024]{{2,1,0}} parameter(0)
  %new = bf16[4096,1024]{{1,0}} parameter(1)
  %at = s32[] parameter(2)
  %one = bf16[1,4096,1024]{{2,1,0}} bitcast(%new)
  ROOT %whole = bf16[32,4096,1024]{{2,1,0}} dynamic-update-slice(%stack, %one, %at, %at, %at)
}}

%drop (x: bf16[8192,4096]) -> bf16[8192,4096] {{
  %x = bf16[8192,4096]{{1,0}} parameter(0)
  %bits = u32[8192,4096]{{1,0}} xor(%x, %x), {named("jit(step)/jvp(Crab)/llama/q_proj/Dropout_0/_bernoulli/threefry")}
  ROOT %kept = bf16[8192,4096]{{1,0}} select(%bits, %x), {named("jit(step)/jvp(Crab)/llama/q_proj/Dropout_0/select_n")}
}}

ENTRY %main (p: bf16[32,4096,1024]) -> bf16[8192,1024] {{
  %p = bf16[32,4096,1024]{{2,1,0}} parameter(0)
  %x = bf16[8192,4096]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  %w = bf16[1,4096,1024]{{2,1,0}} fusion(%p, %i), kind=kLoop, calls=%slices
  %w.2 = bf16[4096,1024]{{1,0}} bitcast(%w)
  %kept = bf16[8192,4096]{{1,0}} fusion(%x), kind=kLoop, calls=%drop
  %stack = bf16[32,4096,1024]{{2,1,0}} fusion(%p, %w.2, %i), kind=kLoop, calls=%update
  %sum = bf16[4096]{{0}} all-reduce(%y), channel_id=1, to_apply=%add
  ROOT %out = (bf16[8192,1024]{{1,0}}, s8[4096]{{0}}) custom-call(%kept, %w.2), custom_call_target="__cublas$gemm", \
{named("jit(step)/jvp(Crab)/llama/layers/q_proj/dot_general")}, backend_config={{"gemm_backend_config":\
{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}}}}
}}
"""


def test_a_gpu_reads_of_a_stack_only_the_layer_and_takes_the_roofline_of_every_kernel():
    program, h200 = hlo.ops(GPU), next(gpu for gpu in chips.GPUS if gpu.name == "h200")
    traffic = {op.name: op.traffic for op in program}
    layer, rows = 2 * 4096 * 1024, 2 * 8192 * 4096
    assert traffic["w"] == 2 * layer + 4 and traffic["stack"] == 2 * layer + 4
    assert traffic["kept"] == 2 * rows and traffic["sum"] == 0
    assert cost.kernels_run(program) == 4
    times = cost.spent(program, h200)
    parts = cost.by_part(times)
    assert parts["base"] == pytest.approx(2 * 8192 * 4096 * 1024 / h200.flops)
    assert parts["lora"] == pytest.approx(2 * rows / h200.hbm_bandwidth)
    assert parts["other"] == pytest.approx((4 * layer + 8) / h200.hbm_bandwidth)
    assert sum(cost.traffic_by_part(times).values()) == sum(traffic.values())


def test_bits_of_a_gpu_take_what_their_kernel_would_not_without_them():
    h200 = next(gpu for gpu in chips.GPUS if gpu.name == "h200")
    program = hlo.ops(GPU.replace("%bits = u32[8192,4096]", "%bits = u32[8192,409600]"))
    times = cost.spent(program, h200)
    parts = cost.by_part(times)
    wanted = 8192 * (409600 + 4096) / h200.vector_ops
    assert parts["dropout_bits"] + parts["lora"] == pytest.approx(wanted)
    assert parts["lora"] == pytest.approx(4 * 8192 * 4096 / h200.hbm_bandwidth)
    assert sum(cost.traffic_by_part(times).values()) == sum(op.traffic for op in program), "a kernel counts once"


def double(x, grid=4, **options):
    def body(x_ref, y_ref, o_ref):
        o_ref[...] = jnp.exp(x_ref[...] @ y_ref[...])

    block = pl.BlockSpec((8, 128), lambda i: (i, 0))
    whole = pl.BlockSpec((128, 128), lambda i: (0, 0))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(body, out_shape=shape, grid=(grid,), in_specs=[block, whole], out_specs=block, **options)(
        x, jnp.ones((128, 128))
    )


def test_a_pallas_kernel_counts_its_body_times_its_grid_or_what_it_says():
    x = jnp.ones((32, 128))
    work = flops.count(double, x)
    assert work.flops == 2 * 32 * 128 * 128 and work.bytes == 4 * (2 * 32 * 128 + 128 * 128)
    said = pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=9)
    assert flops.count(lambda x: double(x, cost_estimate=said), x) == (7, 9)
    (kernel,) = flops.kernels(jax.make_jaxpr(lambda x: double(x, name="twice"))(x).jaxpr)
    assert (kernel.name, kernel.results, kernel.vector) == ("twice", ((32, 128),), 32 * 128)


def test_the_body_of_a_shard_map_runs_on_every_device():
    mesh = jax.sharding.AbstractMesh((4, 2), ("rows", "other"))
    rows = jax.sharding.PartitionSpec("rows")

    def step(x, w):
        whole = jax.sharding.PartitionSpec()
        return jax.shard_map(
            lambda x, w: x @ w, mesh=mesh, in_specs=(rows, whole), out_specs=rows, axis_names={"rows"}, check_vma=False
        )(x, w)

    assert flops.count(step, jnp.ones((32, 16)), jnp.ones((16, 8))).flops == 2 * 32 * 16 * 8
