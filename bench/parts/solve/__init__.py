"""Whole solves of one case by several libraries; also used by speed, gradients and device_loop."""
