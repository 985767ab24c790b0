"""From a request to a response: validation, admission, evaluators' health, calibration."""
