"""What accelerators can do at best, from their makers' sheets.

Peaks are of dense bf16 products. Links are what one GPU sends in one direction: inside a node
(NVLink, half of the advertised sum of both directions) and out of it (the network port that the
maker's reference machine gives each GPU).
"""

from dataclasses import dataclass

from microtron.errors import UserError


@dataclass(frozen=True)
class Device:
    """One accelerator in its usual machine.

    Attributes:
        flops: dense bf16 FLOP/s.
        memory_bytes, memory_bytes_s: size and bandwidth of its memory.
        intra_bytes_s, inter_bytes_s: one direction, inside and out of a node.
        node: accelerators in a node.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_bytes_s: float
    intra_bytes_s: float
    inter_bytes_s: float
    node: int = 8


DEVICES: dict[str, Device] = {
    # NVIDIA A100 datasheet (2021-06): 312 TFLOP/s, 80 GB HBM2e at 2039 GB/s (SXM), NVLink 600 GB/s;
    # DGX A100: one 200 Gb/s HDR port a GPU. The 40 GB card: HBM2 at 1555 GB/s.
    "a100": Device("A100 80GB SXM", 312e12, 80e9, 2.039e12, 300e9, 25e9),
    "a100-40": Device("A100 40GB SXM", 312e12, 40e9, 1.555e12, 300e9, 25e9),
    # NVIDIA H100 datasheet (2023): 1979 TFLOP/s with sparsity, so 989 dense; 80 GB HBM3 at
    # 3.35 TB/s, NVLink 900 GB/s; DGX H100: one 400 Gb/s NDR port a GPU.
    "h100": Device("H100 SXM", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    # The same sheet, PCIe: 1513 with sparsity, 80 GB HBM2e at 2 TB/s; PCIe 5.0 x16 is 128 GB/s
    # both ways, and the network shares it.
    "h100-pcie": Device("H100 PCIe", 756e12, 80e9, 2.0e12, 64e9, 50e9),
    # NVIDIA H200 datasheet (2024): the H100's arithmetic, 141 GB HBM3e at 4.8 TB/s.
    "h200": Device("H200 SXM", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    # NVIDIA DGX B200 datasheet (2024), an eighth of the machine: FP8 72 PFLOP/s with sparsity makes
    # 4.5 dense, bf16 half of it; 1440 GB at 64 TB/s; NVLink 1.8 TB/s; one 400 Gb/s port a GPU.
    "b200": Device("B200 SXM", 2.25e15, 180e9, 8.0e12, 900e9, 50e9),
    # NVIDIA L40S datasheet (2023): 362 TFLOP/s bf16 dense, 48 GB GDDR6 at 864 GB/s, no NVLink:
    # PCIe 4.0 x16 is 64 GB/s both ways; NVIDIA's reference server (OVX) has 200 Gb/s for two.
    "l40s": Device("L40S", 362e12, 48e9, 0.864e12, 32e9, 12.5e9),
    # NVIDIA Ada architecture paper (2022), appendix A: 165.2 TFLOP/s bf16 with fp32 accumulation,
    # 24 GB at 1008 GB/s, PCIe 4.0 x16; no usual network: 10 Gb/s.
    "rtx4090": Device("RTX 4090", 165.2e12, 24e9, 1.008e12, 32e9, 1.25e9),
    # AMD MI300X datasheet (2023): 1307 TFLOP/s, 192 GB at 5.3 TB/s, seven Infinity Fabric links of
    # 128 GB/s both ways; one 400 Gb/s port a GPU.
    "mi300x": Device("MI300X", 1307e12, 192e9, 5.3e12, 448e9, 50e9),
}


def device(name: str) -> Device:
    """A device by name.

    Raises:
        UserError: it is not in the table.
    """
    if name not in DEVICES:
        raise UserError(
            f"--device {name} is unknown: choose one of {', '.join(DEVICES)}, or cpu (formulas of "
            "CPU ranks, no times)"
        )
    return DEVICES[name]
