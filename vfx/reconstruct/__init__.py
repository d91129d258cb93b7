"""Layer-wise reconstruction: every layer of a network solved for what reference networks compute there."""
