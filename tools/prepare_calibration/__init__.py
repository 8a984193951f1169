from tools.prepare_calibration.command import prepare_calibration

__all__ = ["prepare_calibration"]
