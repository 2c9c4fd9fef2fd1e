"""What the methods and calibrations are called in results, in tables and figures."""

OURS, OFF = "ssdkd", "SSD-KD off"
PEERS = ("fast-2", "fast-5", "fast-10", "nayer")
CALIBRATIONS = OUR_SAMPLES, REAL_IMAGES, NOISE = "our samples", "real images", "noise"
