"""tarflow_export"""
