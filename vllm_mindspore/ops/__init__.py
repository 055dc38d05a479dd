"""The operator library: each operator is a torch schema, a fake, and a MindSpore implementation per device."""
