"""What a call costs: tiles counted, time predicted, kernels named."""
