"""Small NIfTI volumes for tests, drawn from a seed, and LiTS-like trees of them; nibabel writes the headers."""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPE = (7, 5, 4)
"""Voxels along i, j and k."""

AFFINES = {
    "RAS": np.array([[0.7, 0, 0, -120], [0, 0.8, 0, -90], [0, 0, 2.5, 40], [0, 0, 0, 1]]),
    "LPS": np.array([[-0.7, 0, 0, 120], [0, -0.8, 0, 90], [0, 0, 2.5, 40], [0, 0, 0, 1]]),
    "LAS": np.array([[-0.7, 0, 0, 120], [0, 0.8, 0, -90], [0, 0, 2.5, 40], [0, 0, 0, 1]]),
    "PIR": np.array([[0, 0, 1.5, 3], [-0.7, 0, 0, 120], [0, -0.8, 0, 90], [0, 0, 0, 1]]),
    "LPS oblique": np.array([[-0.7, 0, 0, 120], [0, -0.75, 0.85, 90], [0, 0.28, 2.3, 40], [0, 0, 0, 1]]),
}
"""Voxel-to-world matrices by the name that ``volume.orientation`` must give them."""


def ct(shape: tuple[int, ...] = SHAPE, dtype: str = "int16", seed: int = 0) -> NDArray[Any]:
    """Noise over the type's whole range (floats: -1024 to 3071 with fractions), indexed [i, j, k]."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.uniform(-1024, 3071, shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def labels(shape: tuple[int, ...] = SHAPE, dtype: str = "uint8", ids: tuple[int, ...] = (0, 1, 2)) -> NDArray[Any]:
    """Random label ids of any voxel type, indexed [i, j, k]."""
    return np.random.default_rng(1).choice(np.array(ids), shape).astype(dtype)


def nifti(
    voxels: NDArray[Any],
    affine: NDArray[np.float64] = AFFINES["LPS"],
    *,
    version: int = 1,
    byte_order: str = "<",
    transforms: str = "sform qform",
    scaling: tuple[float, float] = (0.0, 0.0),
    comment: bytes = b"",
    padding: int = 0,
    zipped: bool = False,
    **fields: Any,
) -> bytes:
    """The bytes of a NIfTI file.

    Args:
        voxels: indexed [i, j, k, ...]; also structured (colours) and complex ones.
        affine: for the transforms that are written.
        version: 1 or 2.
        byte_order: of header and voxels.
        transforms: which ones the header gets; without any, only the voxel sizes count.
        scaling: slope and intercept.
        comment: content of a header extension.
        padding: further zero bytes before the voxels.
        zipped: whether to gzip it.
        fields: header fields to overwrite at last, e.g. ``cal_max=3000``.
    """
    from nibabel.nifti1 import Nifti1Extension, Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    header = (Nifti1Header if version == 1 else Nifti2Header)(endianness=byte_order)
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    zooms = np.ones(voxels.ndim)
    zooms[:3] = np.linalg.norm(affine[:3, :3], axis=0)[: voxels.ndim]
    header.set_zooms(zooms)
    header.set_xyzt_units("mm", "sec")
    header["scl_slope"], header["scl_inter"] = scaling
    if "sform" in transforms:
        header.set_sform(affine, 1)
    if "qform" in transforms:
        header.set_qform(affine, 1)
    if comment:
        header.extensions.append(Nifti1Extension("comment", comment))
    header["vox_offset"] = header.single_vox_offset + header.extensions.get_sizeondisk() + padding
    for name, value in fields.items():
        header[name] = value
    file = io.BytesIO()
    header.write_to(file)
    file.write(bytes(padding) + voxels.astype(voxels.dtype.newbyteorder(byte_order)).tobytes(order="F"))
    return gzip.compress(file.getvalue(), mtime=0) if zipped else file.getvalue()


def save(path: Path, voxels: NDArray[Any], affine: NDArray[np.float64] = AFFINES["LPS"], **options: Any) -> Path:
    """Write a NIfTI file; ``.gz`` at the end of its name means gzipped. Folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(nifti(voxels, affine, zipped=path.suffix == ".gz", **options))
    return path


def oracle(data: bytes) -> Any:
    """nibabel's image of the file."""
    from nibabel.nifti1 import Nifti1Image
    from nibabel.nifti2 import Nifti2Image

    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return (Nifti2Image if plain[4:8] == b"n+2\0" else Nifti1Image).from_bytes(plain)


def stored(data: bytes) -> NDArray[Any]:
    """The voxels as nibabel finds them, unscaled, indexed [i, j, k]."""
    return np.asarray(oracle(data).dataobj.get_unscaled())
