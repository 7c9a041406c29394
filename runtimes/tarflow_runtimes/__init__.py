"""tarflow_runtimes"""
