"""Flower apps on fedml: a stock Strategy and a stock ClientApp, run as they are.

`grid` answers a ServerApp's messages, `simulation` runs an app's folder, `record` lets it go on
after a crash. What is not Flower's public interface is touched in `private` alone.
"""

import os

# Flower reads both when it is first imported: nobody is told that it runs here.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
