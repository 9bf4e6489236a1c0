"""NVIDIA GPUs as XLA's compiler sees them: what it has to know of a GPU that is not here.

Memory, bandwidth, cores, clock and cache are those of the target descriptions that XLA publishes with its
source (openxla/xla, `xla/backends/gpu/target_config/specs`); they decide how XLA cuts kernels.
"""

from typing import Any, NamedTuple

from jax.experimental import topologies


class Gpu(NamedTuple):
    """What tells one GPU from another: sizes in bytes, bandwidth in bytes a second, the clock in GHz."""

    name: str
    capability: str
    memory: int
    bandwidth: float
    cores: int  # streaming multiprocessors
    units: int  # float32 units of each
    clock: float
    cache: int  # level 2
    shared: int  # memory shared by the threads of a core, and what a block of them may ask for
    shared_of_block: int


_HOPPER = {
    "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
    "cores": 132,
    "units": 128,
    "clock": 1.98,
    "cache": 50 * 2**20,
    "shared": 228 * 2**10,
    "shared_of_block": 227 * 2**10,
}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory=84_942_979_072, bandwidth=3352.32e9, **_HOPPER),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", memory=151_397_597_184, bandwidth=4800e9, **_HOPPER),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        capability="major: 8",
        memory=85_100_068_864,
        bandwidth=2039.04e9,
        cores=108,
        units=64,
        clock=1.41,
        cache=40 * 2**20,
        shared=164 * 2**10,
        shared_of_block=163 * 2**10,
    ),
}
# Of CUDA and its driver. Graphs have conditional nodes from 12.4 on.
_CUDA = 13


def devices(name: str, count: int = 1) -> list[Any]:
    """`count` GPUs of that name in one host, to compile for; `JAX_PLATFORMS=cpu` where there is no GPU."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_description(GPUS[name]), topology=f"1x1x{count}"
    )
    return list(topology.devices)


def _description(gpu: Gpu) -> str:
    """The GPU as a `GpuTargetConfigProto` in text."""
    return f"""
      platform_name: "CUDA"
      device_description_str: "{gpu.name}"
      dnn_version_info {{ major: 9 minor: 10 }}
      runtime_version {{ major: {_CUDA} }}
      gpu_device_info {{
        name: "{gpu.name}"
        cuda_compute_capability {{ {gpu.capability} }}
        driver_version: "{_CUDA}.0.0"
        runtime_version: "{_CUDA}.0.0"
        compile_time_toolkit_version: "{_CUDA}.0.0"
        dnn_version: "9.10.0"
        device_memory_size: {gpu.memory}
        memory_bandwidth: {gpu.bandwidth:.0f}
        l2_cache_size: {gpu.cache}
        core_count: {gpu.cores}
        fpus_per_core: {gpu.units}
        clock_rate_ghz: {gpu.clock}
        shared_memory_per_core: {gpu.shared}
        shared_memory_per_block: {48 * 2**10}
        shared_memory_per_block_optin: {gpu.shared_of_block}
        threads_per_warp: 32
        threads_per_block_limit: 1024
        threads_per_core_limit: 2048
        registers_per_core_limit: {2**16}
        registers_per_block_limit: {2**16}
        thread_dim_limit_x: 1024
        thread_dim_limit_y: 1024
        thread_dim_limit_z: 64
        block_dim_limit_x: {2**31 - 1}
        block_dim_limit_y: {2**16 - 1}
        block_dim_limit_z: {2**16 - 1}
      }}
    """
