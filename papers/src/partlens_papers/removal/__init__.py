"""Feature removal (Oramas et al., ICLR 2019): the network without its relevant features."""
