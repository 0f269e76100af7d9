"""What a layer costs: counted on fake tensors, or measured on the devices, as a stage runs it."""
