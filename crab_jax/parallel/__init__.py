"""Several devices, processes and hosts as one run: meshes, shardings, preemption and failed processes."""
