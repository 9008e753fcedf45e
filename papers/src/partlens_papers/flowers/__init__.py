"""The flower benchmark (an8Flower, Oramas et al., ICLR 2019): sets, networks, methods, scores."""
