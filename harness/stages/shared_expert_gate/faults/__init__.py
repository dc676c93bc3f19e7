"""Wrong implementations of the stage `shared_expert_gate`."""
