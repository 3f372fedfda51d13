"""Types of csrc/host/module.cpp."""

import numpy as np
import numpy.typing as npt

def first_fit_decreasing(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]: ...
