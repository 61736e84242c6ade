"""Seconds for each amount of work before a store has timings of its own; see :mod:`dpkit.stages.costs`.

The table for processors was measured on two cores of an AMD EPYC (Zen 5), torch 2.13, one thread a process, memory kept: units
of every kind at several sizes of network, data set and schedule, fitted as a store's own timings are (DM, MTT and the diffusion
model: two settings each; comparing masks, robustness and alignment: one or two). `dpkit predict --coefficients` prints such a
table from any store. The other constants here are estimates, each of which a store's own timings soon outweigh; the table for
GPUs is one of them.
"""

#: the processor that the table below was measured on
PROCESSOR = "AMD EPYC"

#: seconds for each amount, by kind; amounts as in :class:`dpkit.stages.features.Features`
CPU: dict[str, dict[str, float]] = {
    "choose": {"unit": 0.0022, "gflop": 0.018},
    "dm/fp32": {"unit": 0.02, "step": 0.018, "gflop": 0.0024, "gbyte": 0.29, "norm gbyte": 0.094, "augmented mpixel": 0.004},
    "generator/fp32": {"unit": 2.0, "step": 0.014, "gflop": 0.00145},
    "hessian/float32": {"unit": 0.0072, "step": 0.0031, "gflop": 0.006, "gbyte": 0.18, "norm gbyte": 0.098},
    "idc/fp32": {"unit": 0.033, "step": 0.034, "gflop": 0.0036, "gbyte": 0.44, "norm gbyte": 0.14, "network step": 0.0045,
                 "network gflop": 0.027, "augmented mpixel": 0.0059},
    "mtt": {"unit": 0.1, "step": 0.008, "gflop": 0.0022, "gbyte": 0.36, "norm gbyte": 0.11},
    "network/bf16": {"unit": 0.0083, "step": 0.0017, "gflop": 0.0059, "gbyte": 0.29, "norm gbyte": 0.17,
                     "augmented step": 0.0008, "augmented mpixel": 0.0033, "test gflop": 0.016},
    "network/bf16+compile": {"unit": 0.0052, "step": 0.00091, "gflop": 0.0019, "gbyte": 0.096, "norm gbyte": 0.096,
                             "augmented step": 0.00052, "augmented mpixel": 0.0021, "test gflop": 0.01},
    "network/fp32": {"unit": 0.0055, "step": 0.00098, "gflop": 0.006, "gbyte": 0.16, "norm gbyte": 0.13,
                     "augmented step": 0.0004, "augmented mpixel": 0.0019, "test gflop": 0.012},
    "path/fp32": {"unit": 0.0052, "step": 0.0021, "gflop": 0.0079, "gbyte": 0.12, "norm gbyte": 0.14},
    "alignment/fp32": {"unit": 0.022, "step": 0.0024, "gflop": 0.009, "gbyte": 0.135, "norm gbyte": 0.16, "mweight": 2.2},
    "plane/fp32": {"unit": 0.0067, "step": 0.0007, "gflop": 0.0088, "gbyte": 0.15, "norm gbyte": 0.17},
    "ticket": {"unit": 0.0016, "mweight": 0.091, "gflop": 0.018},
    "compare": {"unit": 0.0033, "mweight": 0.31},
    "robustness/fp32": {"unit": 0.004, "step": 0.00028, "gflop": 0.0035, "gbyte": 0.06, "norm gbyte": 0.067,
                        "augmented mpixel": 0.018},
}

#: a GPU has no measured table yet: launching a kernel costs what it costs on any machine, and the rest follows a data sheet
CUDA: dict[str, dict[str, float]] = {
    "network": {"unit": 0.05, "step": 5e-3, "gflop": 5e-5, "gbyte": 1e-3, "augmented step": 2e-3, "augmented mpixel": 1e-5,
                "test gflop": 1e-4},
    "idc": {"unit": 0.5, "step": 0.2, "gflop": 5e-5, "gbyte": 1e-3, "network step": 8e-3, "network gflop": 5e-5,
            "augmented mpixel": 1e-5},
    "choose": {"unit": 0.05, "gflop": 1e-4},
    "dm": {"unit": 0.5, "step": 0.03, "gflop": 5e-5, "gbyte": 1e-3, "augmented mpixel": 1e-5},
    "mtt": {"unit": 0.5, "step": 0.03, "gflop": 5e-5, "gbyte": 1e-3},
    "generator": {"unit": 2.0, "step": 0.06, "gflop": 5e-5},
    "ticket": {"unit": 0.02, "mweight": 0.05, "gflop": 5e-5},
    "compare": {"unit": 0.02, "mweight": 0.2},
    "robustness": {"unit": 0.02, "step": 2e-3, "gflop": 5e-5, "gbyte": 5e-4, "augmented mpixel": 0.02},
    "path": {"unit": 0.02, "step": 2e-3, "gflop": 5e-5, "gbyte": 5e-4},
    "alignment": {"unit": 0.05, "step": 2e-3, "gflop": 5e-5, "gbyte": 5e-4, "mweight": 2.0},
    "plane": {"unit": 0.02, "step": 2e-3, "gflop": 5e-5, "gbyte": 5e-4},
    "hessian": {"unit": 0.1, "step": 0.02, "gflop": 1e-4, "gbyte": 2e-3},
}

#: how much less or more an amount costs where a kind has no row of its own: in bf16, and compiled
WAYS: dict[str, dict[str, float]] = {"bf16": {"gflop": 0.5, "gbyte": 1.0}, "compile": {"gflop": 0.6, "gbyte": 0.6},
                                     "float64": {"gflop": 2.2, "gbyte": 1.0}}

START = 2.5  # seconds until a worker process takes its first unit
LOAD = 2.0  # and for each gigabyte of images that it reads and normalises
COMPILE = 12.0  # one compiled function of a training step, nothing cached; 27 was seen for a matching step
NOTEBOOK = 12.0  # a notebook around its computation: two processes that load the library, the figures
